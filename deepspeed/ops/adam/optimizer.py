"""The Adam optimizers: usable alone, and by the sharding core on flat leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from deepspeed.errors import ConfigError, UsageError
from deepspeed.ops.adam.compiled import CompiledPass
from deepspeed.ops.adam.kernel import (
    CHUNK,
    AdamHyper,
    AdamTensors,
    Control,
    fused_kernel,
    kernel_serves,
    update,
)


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
        set_grad_none: what ``zero_grad`` does; must be True.
        state_dtype: dtype of the moments; None: fp32 (fp64 for fp64 parameters).
        compile: True compiles the update, False never does, None where a compiler is present and the
            optimizer is large enough for it to pay.

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
        compile: bool | None = None,
    ) -> None:
        if amsgrad:
            raise ConfigError("amsgrad: expected False, got True; torch.optim.AdamW (torch_adam) has it")
        if not set_grad_none:
            raise ConfigError("set_grad_none: expected True, got False; zero_grad(set_to_none=False) fills")
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
        self._compiled = CompiledPass(compile)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient; return what `closure` returned.

        Raises:
            UsageError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            small: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
            for param in group["params"]:
                if param.grad is None:
                    continue
                if param.grad.is_sparse:
                    raise UsageError("FusedAdam: expected dense gradients, got a sparse one; use SparseAdam")
                if self._is_plain(param):
                    small.setdefault((param.device, param.dtype), []).append(param)
                else:
                    self._update_param(param, group)
            for params in small.values():
                self._update_together(params, group)
        return loss

    def _is_plain(self, param: Tensor) -> bool:
        """Whether a parameter can share one call of torch's kernel with others: small, all of one wide dtype."""
        grad = param.grad
        return (
            grad is not None
            and param.numel() < CHUNK
            and param.is_contiguous()
            and grad.is_contiguous()
            and param.dtype == grad.dtype == self._dtype_of_state(param)
            and kernel_serves(param)
        )

    def _update_together(self, params: list[Tensor], group: dict[str, Any]) -> None:
        states = [self._state_of(param) for param in params]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        moments = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
        grads = [param.grad for param in params if param.grad is not None]
        fused_kernel(params, grads, moments, steps, self._hyper(group))

    def _update_param(self, param: Tensor, group: dict[str, Any]) -> None:
        grad = param.grad
        assert grad is not None
        if param.is_contiguous():
            self.update_leaf(param.view(-1), group, grad.reshape(-1), state_of=param)
            return
        flat = param.contiguous().view(-1)
        self.update_leaf(flat, group, grad.contiguous().view(-1), state_of=param)
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
        state = self._state_of(leaf if state_of is None else state_of)
        if leaf.numel() == 0:
            return
        skip = None if found_inf is None else (found_inf != 0).float()
        step = state["step"]
        step += 1 if skip is None else 1 - skip
        control = Control(step, scale, skip)
        tensors = AdamTensors(
            leaf.detach(), state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1), grad, out
        )
        hyper = self._hyper(group)
        self._compiled.decide(leaf.device.type, self._numel)
        if not self._compiled.update(tensors, hyper, control):
            update(tensors, hyper, control)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned; the moments keep the dtype this optimizer keeps them in."""
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for index, param in zip(saved, params, strict=True):
            for name in ("exp_avg", "exp_avg_sq"):  # torch has cast them to the dtype of the parameter
                value = state_dict["state"].get(index, {}).get(name)
                if value is not None:
                    wanted = {"device": param.device, "dtype": self._dtype_of_state(param), "copy": True}
                    self.state[param][name] = value.to(**wanted)

    def __getstate__(self) -> dict[str, Any]:
        kept = {"adam_w_mode": self.adam_w_mode, "state_dtype": self.state_dtype}
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._compiled = CompiledPass()

    def _numel(self) -> int:
        return sum(param.numel() for group in self.param_groups for param in group["params"])

    def _state_of(self, key: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[key]
        if not state:
            dtype = self._dtype_of_state(key)
            state["step"] = torch.zeros((), dtype=torch.float32, device=key.device)
            state["exp_avg"] = torch.zeros_like(key, dtype=dtype, memory_format=torch.contiguous_format)
            state["exp_avg_sq"] = torch.zeros_like(key, dtype=dtype, memory_format=torch.contiguous_format)
        return state

    def _dtype_of_state(self, key: Tensor) -> torch.dtype:
        return self.state_dtype or torch.promote_types(key.dtype, torch.float32)

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
