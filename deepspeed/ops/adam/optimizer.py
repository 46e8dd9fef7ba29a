"""The Adam optimizers: usable alone, and by the sharding core on flat leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from deepspeed.errors import ConfigError
from deepspeed.ops.adam.compiled import WORTHWHILE, compiled_pass, give_up
from deepspeed.ops.adam.kernel import AdamHyper, AdamTensors, chunked_pass, scalars


class FusedAdam(torch.optim.Optimizer):
    """Adam (or AdamW) that reads and writes each byte once.

    Args:
        params: parameters or param groups, on any device, in any floating dtype.
        lr: learning rate.
        bias_correction: correct the moments for their start at zero.
        betas: decay rates of the moments.
        eps: added to the denominator.
        adam_w_mode: decoupled weight decay (AdamW); False adds it to the gradient.
        weight_decay: weight decay.
        amsgrad: not supported.
        set_grad_none: accepted for the original's sake; ``zero_grad`` always sets to None.
        state_dtype: dtype of the moments; None: fp32 (fp64 for fp64 parameters).

    Raises:
        ConfigError: `amsgrad` is set, or a number is out of range.
    """

    elementwise = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        if amsgrad:
            raise ConfigError("amsgrad: expected False, got True; torch.optim.AdamW has it")
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(
                "Adam: expected lr, eps, weight_decay >= 0 and betas in [0, 1), got "
                f"lr={lr}, eps={eps}, weight_decay={weight_decay}, betas={tuple(betas)}"
            )
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode
        self.state_dtype = state_dtype
        self._large: bool | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient; return what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group, param.grad)
        return loss

    def _update(self, param: Tensor, group: dict[str, Any], grad: Tensor) -> None:
        if param.is_contiguous():
            self.update_leaf(param.view(-1), group, grad.reshape(-1), state_of=param)
            return
        flat = param.contiguous().view(-1)
        self.update_leaf(flat, group, grad.contiguous().reshape(-1), state_of=param)
        param.copy_(flat.view(param.shape))

    @torch.no_grad()
    def update_leaf(
        self,
        leaf: Tensor,
        group: dict[str, Any],
        grad: Tensor,
        *,
        out: Tensor | None = None,
        scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        state_of: Tensor | None = None,
    ) -> None:
        """Update one flat tensor in one pass.

        Args:
            leaf: master weights, flat, updated in place.
            group: the param group whose hyper-parameters count.
            grad: gradient, as long as `leaf`, any floating dtype.
            out: low-precision copy of the weights to refresh.
            scale: 0-dim factor on the gradient.
            found_inf: 0-dim; nonzero leaves everything as it is, the step count too.
            state_of: key of the state; default `leaf`.
        """
        key = leaf if state_of is None else state_of
        state = self.state[key] or self._new_state(key)
        if leaf.numel() == 0:
            return
        step = state["step"]
        step += 1 if found_inf is None else (found_inf == 0).to(step.dtype)
        hyper = self._hyper(group)
        numbers = scalars(hyper, step, scale, found_inf, leaf.device)
        if leaf.device.type == "cpu" and numbers[9] == 0:
            return
        moments = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
        tensors = AdamTensors(leaf, *moments, grad, out)
        if not self._run_compiled(tensors, numbers, hyper.decoupled):
            chunked_pass(tensors, hyper, step, numbers)

    def _run_compiled(self, tensors: AdamTensors, numbers: Tensor, decoupled: bool) -> bool:
        if self._large is None:
            numel = sum(param.numel() for group in self.param_groups for param in group["params"])
            self._large = numel >= WORTHWHILE
        run = compiled_pass(tensors.master.device.type) if self._large else None
        if run is None:
            return False
        try:
            run(
                tensors.master,
                tensors.exp_avg,
                tensors.exp_avg_sq,
                tensors.grad,
                tensors.out,
                numbers,
                decoupled,
            )
        except (RuntimeError, OSError) as error:  # a compiler that is there and does not work
            give_up(error)
            return False
        return True

    def _new_state(self, key: Tensor) -> dict[str, Any]:
        dtype = self.state_dtype or torch.promote_types(key.dtype, torch.float32)
        state: dict[str, Any] = self.state[key]
        state["step"] = torch.zeros((), dtype=torch.float32, device=key.device)
        state["exp_avg"] = torch.zeros_like(key, dtype=dtype, memory_format=torch.contiguous_format)
        state["exp_avg_sq"] = torch.zeros_like(key, dtype=dtype, memory_format=torch.contiguous_format)
        return state

    def _hyper(self, group: dict[str, Any]) -> AdamHyper:
        beta1, beta2 = group["betas"]
        return AdamHyper(
            lr=float(group["lr"]),
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            bias_correction=group["bias_correction"],
            decoupled=self.adam_w_mode,
        )


class DeepSpeedCPUAdam(FusedAdam):
    """`FusedAdam` with the argument order of the original's host optimizer.

    Args:
        model_params: parameters or param groups.
        adamw_mode: decoupled weight decay.
        fp32_optimizer_states: keep the moments in fp32; False: in the parameters' dtype.
    """

    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,
    ) -> None:
        super().__init__(
            model_params,
            lr=lr,
            bias_correction=bias_correction,
            betas=betas,
            eps=eps,
            adam_w_mode=adamw_mode,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
        )
        if not fp32_optimizer_states:
            self.state_dtype = self.param_groups[0]["params"][0].dtype
