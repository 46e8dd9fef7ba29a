"""The Adam optimizers: usable alone, and by the sharding core on flat leaves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from deepspeed.errors import ConfigError
from deepspeed.ops.adam.compiled import CompiledPass
from deepspeed.ops.adam.kernel import AdamHyper, AdamTensors, Control, fused_kernel, kernel_serves, update
from deepspeed.ops.pieces import CHUNK
from deepspeed.ops.stepping import LeafOptimizer, check_betas, check_numbers, count_step


class FusedAdam(LeafOptimizer):
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
        check_numbers(lr=lr, eps=eps, weight_decay=weight_decay)
        check_betas(betas)
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

    def _update_group(self, params: list[Any], group: dict[str, Any]) -> None:
        small: dict[tuple[torch.device, torch.dtype], list[Any]] = {}
        for param in params:
            if self._is_plain(param, param.grad):
                small.setdefault((param.device, param.dtype), []).append(param)
            else:
                self.update_leaf(param, group, param.grad)
        for together in small.values():
            self._update_together(together, group)

    def _is_plain(self, param: Tensor, grad: Tensor) -> bool:
        """Whether a parameter can share one call of torch's kernel with others: small, all of one wide dtype."""
        return (
            param.numel() < CHUNK
            and param.is_contiguous()
            and grad.is_contiguous()
            and param.dtype == grad.dtype == self.dtype_of_state(param)
            and kernel_serves(param)
        )

    def _update_together(self, params: list[Any], group: dict[str, Any]) -> None:
        states = [self._moments_of(param) for param in params]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        moments = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
        fused_kernel(params, [param.grad for param in params], moments, steps, self._hyper(group))

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
    ) -> None:
        state = self._moments_of(leaf)
        if leaf.numel() == 0:
            return
        skip = None if found_inf is None else (found_inf != 0).float()
        control = Control(count_step(state, found_inf), scale, skip)
        flat = leaf.detach().contiguous().view(-1)  # the leaf's own memory, or a copy that goes back below
        tensors = AdamTensors(
            flat,
            state["exp_avg"].view(-1),
            state["exp_avg_sq"].view(-1),
            grad.reshape(-1),
            None if out is None else out.view(-1),
        )
        hyper = self._hyper(group)
        self._compiled.decide(leaf.device.type, self._numel)
        if not self._compiled.update(tensors, hyper, control):
            update(tensors, hyper, control)
        if not leaf.is_contiguous():
            leaf.copy_(flat.view(leaf.shape))

    def __getstate__(self) -> dict[str, Any]:
        kept = {"adam_w_mode": self.adam_w_mode, "_compiled": self._compiled}
        return {**super().__getstate__(), **kept}

    def _numel(self) -> int:
        return sum(param.numel() for group in self.param_groups for param in group["params"])

    def _moments_of(self, leaf: Tensor) -> dict[str, Any]:
        return self._state_of(leaf, exp_avg=0.0, exp_avg_sq=0.0)

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
            self.narrow_states()
