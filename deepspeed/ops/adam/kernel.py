"""Adam in one pass over memory: gradient in, weights, moments and low-precision weights out.

Note [One fused pass]
Adam does little arithmetic for each byte it moves. Casting the gradient, updating, and casting the weights
back are three trips through memory where one suffices. `adam_pass` says what that one does; compiled it is
one loop. Where it is not compiled, `update` cuts the tensors into pieces that stay in the processor's cache
and lets torch's own fused kernel update each.

Note [The host never waits]
Whether an update is allowed, by how much the gradient is scaled and how many updates there were are 0-dim
tensors on the device. They enter the arithmetic as tensors: nothing is read back, on no device, and so the
same code also runs on fake tensors.

Source: Adam (arXiv 1412.6980), AdamW (arXiv 1711.05101).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from deepspeed.accelerator import get_accelerator
from deepspeed.ops.pieces import piece_size, pieces


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


@dataclass(frozen=True)
class AdamTensors:
    """What one update reads and writes; all flat and of equal length.

    Attributes:
        master: weights that are updated.
        exp_avg, exp_avg_sq: moments.
        grad: any floating dtype; only read.
        out: low-precision copy of `master` to refresh, or None.
    """

    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    grad: Tensor
    out: Tensor | None

    def cut(self) -> Iterator[AdamTensors]:
        """Yield views of pieces of the tensors (see `deepspeed.ops.pieces`)."""
        for parts in pieces(self.master, self.exp_avg, self.exp_avg_sq, self.grad, self.out):
            yield AdamTensors(*parts)


@dataclass(frozen=True)
class Control:
    """What decides on one update, on the device. See Note [The host never waits].

    Attributes:
        step: 0-dim fp32, the number of this update, from 1.
        scale: 0-dim factor on the gradient; None is 1.
        skip: 0-dim fp32; 1 forbids the update, 0 and None do not.
    """

    step: Tensor
    scale: Tensor | None = None
    skip: Tensor | None = None


def numbers(hyper: AdamHyper, control: Control) -> Tensor:
    """Return what `adam_pass` needs as one fp32 vector on the device, computed in fp64.

    They are data, so a schedule that changes them does not recompile. Order: beta1, 1-beta1, beta2, 1-beta2,
    eps, step size, 1/sqrt(second correction), decay, scale, skip. What the host knows comes in one copy; the
    rest is few operations, each of which takes an accelerator longer to start than to do.
    """
    decay = hyper.lr * hyper.weight_decay if hyper.decoupled else hyper.weight_decay
    betas = (hyper.beta1, 1 - hyper.beta1, hyper.beta2, 1 - hyper.beta2)
    known = (*betas, hyper.eps, hyper.lr, 1.0, decay, 1.0, 0.0)
    exact = get_accelerator().send(known, control.step.device, dtype=torch.float64)
    vector = exact.float()
    if hyper.bias_correction:
        corrections = 1 - exact[0:3:2] ** control.step
        vector[5] = hyper.lr / corrections[0]
        vector[6] = corrections[1].rsqrt()
    if control.scale is not None:
        vector[8] = control.scale
    if control.skip is not None:
        vector[9] = control.skip
    return vector


def adam_pass(
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    out: Tensor | None,
    numbers: Tensor,
    decoupled: bool,
) -> None:
    """Update in place, computing in fp32; `numbers` says how. Where its last entry is 1 nothing changes."""
    beta1, rest1, beta2, rest2, eps, step_size, inverse_root, decay, scale, skip = numbers.unbind()
    old = master.float()
    g = grad.float() * scale
    if not decoupled:
        g = g + decay * old
    m = exp_avg.float() * beta1 + g * rest1
    v = exp_avg_sq.float() * beta2 + g * g * rest2
    weight = old * (1 - decay) if decoupled else old
    weight = weight - step_size * (m / (v.sqrt() * inverse_root + eps))
    apply = skip == 0
    weight = torch.where(apply, weight, old)
    exp_avg.copy_(torch.where(apply, m, exp_avg.float()))
    exp_avg_sq.copy_(torch.where(apply, v, exp_avg_sq.float()))
    master.copy_(weight)
    if out is not None:
        out.copy_(weight)


def update(tensors: AdamTensors, hyper: AdamHyper, control: Control) -> None:
    """Do what `adam_pass` does without a compiler, piece by piece.

    torch's fused kernel serves where weights and moments share a wide dtype; narrow moments are computed in
    fp32 by `adam_pass` itself.
    """
    dtype = tensors.master.dtype
    if dtype != tensors.exp_avg.dtype or not kernel_serves(tensors.master):
        vector = numbers(hyper, control)
        for part in tensors.cut():
            adam_pass(
                part.master, part.exp_avg, part.exp_avg_sq, part.grad, part.out, vector, hyper.decoupled
            )
        return
    scratch = None
    if tensors.grad.dtype != dtype or control.scale is not None:
        scratch = torch.empty_like(tensors.master[: piece_size(tensors.master.device)])
    for part in tensors.cut():
        grad = part.grad
        if scratch is not None:
            grad = scratch[: grad.numel()].copy_(grad)
        if control.scale is not None:
            grad.mul_(control.scale)
        fused_kernel(
            [part.master], [grad], ([part.exp_avg], [part.exp_avg_sq]), [control.step], hyper, control.skip
        )
        if part.out is not None:
            part.out.copy_(part.master)


def kernel_serves(weights: Tensor) -> bool:
    """Whether torch's fused kernel exists for this device and keeps this dtype's precision."""
    return weights.device.type in ("cpu", "cuda", "mps", "xpu") and weights.dtype in (
        torch.float32,
        torch.float64,
    )


def fused_kernel(
    weights: list[Tensor],
    grads: list[Tensor],
    moments: tuple[list[Tensor], list[Tensor]],
    steps: list[Tensor],
    hyper: AdamHyper,
    skip: Tensor | None = None,
) -> None:
    """Run torch's fused Adam or AdamW over lists of tensors of one dtype and device."""
    if not hyper.bias_correction:
        steps = [torch.full_like(steps[0], torch.inf)] * len(steps)  # corrections 1 - beta ** inf are 1
    kernel = torch._fused_adamw_ if hyper.decoupled else torch._fused_adam_
    kernel(
        weights,
        grads,
        *moments,
        [],
        steps,
        lr=hyper.lr,
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        weight_decay=hyper.weight_decay,
        eps=hyper.eps,
        amsgrad=False,
        maximize=False,
        found_inf=skip,
    )
