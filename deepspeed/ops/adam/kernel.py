"""Adam in one pass over memory: gradient in, weights, moments and low-precision weights out.

Note [One fused pass]
Adam does little arithmetic for each byte it moves. Casting the gradient, updating, and casting the weights
back are three trips through memory where one suffices. `adam_pass` says what that one does; compiled it is
one loop, and where there is no compiler it runs on chunks that stay in the processor's cache, with torch's
own fused kernel where the dtypes allow.

Source: Adam (arXiv 1412.6980), AdamW (arXiv 1711.05101).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 65_536
"""Elements updated at a time without a compiler: five fp32 streams of it fit a second-level cache."""


@dataclass(frozen=True)
class AdamHyper:
    """Hyper-parameters of one update; `decoupled` is AdamW."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    bias_correction: bool
    decoupled: bool


@dataclass
class AdamTensors:
    """What one update reads and writes; all flat and of equal length.

    Attributes:
        master: weights that are updated.
        exp_avg, exp_avg_sq: moments.
        grad: any floating dtype.
        out: low-precision copy of `master` to refresh, or None.
    """

    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    grad: Tensor
    out: Tensor | None

    def chunk(self, start: int, stop: int) -> AdamTensors:
        out = None if self.out is None else self.out[start:stop]
        return AdamTensors(
            self.master[start:stop],
            self.exp_avg[start:stop],
            self.exp_avg_sq[start:stop],
            self.grad[start:stop],
            out,
        )


def scalars(
    hyper: AdamHyper, step: Tensor, scale: Tensor | None, found_inf: Tensor | None, device: torch.device
) -> Tensor:
    """Return the numbers an update needs as one fp32 vector on the device, computed in fp64.

    They are data, so a schedule that changes them does not recompile. Order: beta1, 1-beta1, beta2, 1-beta2,
    eps, step size, 1/sqrt(second correction), decay, scale, keep (1: update, 0: leave everything).

    Args:
        hyper: hyper-parameters.
        step: 0-dim, the number of this update, from 1.
        scale: 0-dim factor on the gradient; None is 1.
        found_inf: 0-dim, nonzero forbids the update; None never does.
    """
    decay = hyper.lr * hyper.weight_decay if hyper.decoupled else hyper.weight_decay
    fixed = [hyper.beta1, 1 - hyper.beta1, hyper.beta2, 1 - hyper.beta2, hyper.eps]
    if device.type == "cpu":
        count = float(step)
        first, second = _corrections(hyper, count)
        keep = 1.0 if found_inf is None or not found_inf else 0.0
        factor = 1.0 if scale is None else float(scale)
        values = [*fixed, hyper.lr / first, 1 / math.sqrt(second), decay, factor, keep]
        return torch.tensor(values, dtype=torch.float32)
    count_on_device = step.double()
    one = torch.ones((), dtype=torch.float64, device=device)
    first_d = 1 - hyper.beta1**count_on_device if hyper.bias_correction else one
    second_d = 1 - hyper.beta2**count_on_device if hyper.bias_correction else one
    moving = [hyper.lr / first_d, second_d.rsqrt(), one * decay, one if scale is None else scale.double()]
    moving.append(one if found_inf is None else (found_inf == 0).double())
    return torch.cat([torch.tensor(fixed, dtype=torch.float64, device=device), torch.stack(moving)]).float()


def _corrections(hyper: AdamHyper, count: float) -> tuple[float, float]:
    if not hyper.bias_correction or count < 1:
        return 1.0, 1.0
    return 1 - hyper.beta1**count, 1 - hyper.beta2**count


def adam_pass(
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    out: Tensor | None,
    numbers: Tensor,
    decoupled: bool,
) -> None:
    """Update in place; `numbers` comes from `scalars`. Nothing changes where its last entry is 0."""
    beta1, rest1, beta2, rest2, eps, step_size, inverse_root, decay, scale, keep = numbers.unbind()
    old = master.float()
    g = grad.float() * scale
    if not decoupled:
        g = g + decay * old
    m = exp_avg.float() * beta1 + g * rest1
    v = exp_avg_sq.float() * beta2 + g * g * rest2
    weight = old * (1 - decay) if decoupled else old
    weight = weight - step_size * (m / (v.sqrt() * inverse_root + eps))
    apply = keep > 0
    weight = torch.where(apply, weight, old)
    exp_avg.copy_(torch.where(apply, m, exp_avg.float()))
    exp_avg_sq.copy_(torch.where(apply, v, exp_avg_sq.float()))
    master.copy_(weight)
    if out is not None:
        out.copy_(weight)


def chunked_pass(tensors: AdamTensors, hyper: AdamHyper, step: Tensor, numbers: Tensor) -> None:
    """Do what `adam_pass` does, chunk by chunk, without a compiler.

    On the host the scale and the permission to update are known numbers, so torch's fused kernel can serve
    fp32 masters with fp32 moments.
    """
    numel = tensors.master.numel()
    fusable = (
        tensors.master.device.type == "cpu"
        and tensors.master.dtype == tensors.exp_avg.dtype == torch.float32
        and hyper.bias_correction
    )
    scratch = torch.empty(min(CHUNK, numel)) if fusable else None
    for start in range(0, numel, CHUNK):
        part = tensors.chunk(start, min(start + CHUNK, numel))
        if scratch is None:
            adam_pass(
                part.master, part.exp_avg, part.exp_avg_sq, part.grad, part.out, numbers, hyper.decoupled
            )
        else:
            _fused_chunk(part, hyper, step, float(numbers[8]), scratch)


def _fused_chunk(part: AdamTensors, hyper: AdamHyper, step: Tensor, scale: float, scratch: Tensor) -> None:
    grad = scratch[: part.grad.numel()].copy_(part.grad)
    if scale != 1.0:
        grad.mul_(scale)
    kernel = torch._fused_adamw_ if hyper.decoupled else torch._fused_adam_
    kernel(
        [part.master],
        [grad],
        [part.exp_avg],
        [part.exp_avg_sq],
        [],
        [step],
        lr=hyper.lr,
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        weight_decay=hyper.weight_decay,
        eps=hyper.eps,
        amsgrad=False,
        maximize=False,
    )
    if part.out is not None:
        part.out.copy_(part.master)
