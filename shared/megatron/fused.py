"""Parts of a layer with hand-written gradients: same arithmetic as autograd's, fewer copies. Nothing is compiled.

A small model on one CPU thread spends its time in copies as well as in products: `nox -s bench` compares steps with
other implementations. Results are those of the plain operations to the bit, which tests assert.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

IGNORED = -100  # torch's label for what does not count


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Rotary embedding (Su et al., arXiv:2104.09864, eq. 34, halves instead of pairs as in Llama).

    `cos` and `sin` broadcast against `x` [..., head_dim]; their two halves are equal. `out` may be any
    view of x's shape.
    """
    half = x.shape[-1] // 2
    out = torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


class Rotate(torch.autograd.Function):
    """Rotation of (x[:half], x[half:]) by an angle; backward rotates back. Autograd's own version costs 2.5x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotate(grads[0], cos, -sin), None, None


class SplitRotate(torch.autograd.Function):
    """Queries, keys and values out of Megatron's mixed [s, b, groups, heads per group + 2, d], the first two rotated.

    Three contiguous tensors [s, b, heads, d]; the gradient is written in place into one mixed tensor. With queries in
    this order the output of torch's attention has it too, and becomes [s, b, heads * d] without a copy.
    """

    @staticmethod
    def forward(ctx: Any, mixed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        length, batch, groups, heads, dim = mixed.shape
        query = mixed.new_empty(length, batch, groups, heads - 2, dim)
        key = mixed.new_empty(length, batch, groups, dim)
        rotate(mixed[..., :-2, :], cos[..., None, :], sin[..., None, :], query)
        rotate(mixed[..., -2, :], cos, sin, key)
        return query.flatten(2, 3), key, mixed[..., -1, :].clone(memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        query, key, value = grads
        cos, sin = ctx.saved_tensors
        length, batch, groups, dim = key.shape
        mixed = key.new_empty(length, batch, groups, query.shape[2] // groups + 2, dim)
        back = -sin
        rotate(query.unflatten(2, (groups, -1)), cos[..., None, :], back[..., None, :], mixed[..., :-2, :])
        rotate(key, cos, back, mixed[..., -2, :])
        mixed[..., -1, :].copy_(value)
        return mixed, None, None


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up of [gate, up] along the last dimension (Shazeer, arXiv:2002.05202, eq. 6)."""

    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        active = F.silu(gate)
        ctx.save_for_backward(gate_up, active)
        return active * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        gate_up, active = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        out = torch.empty_like(gate_up)
        out_gate, out_up = out.chunk(2, -1)
        torch.ops.aten.silu_backward.grad_input(grads[0] * up, gate, grad_input=out_gate)
        torch.mul(grads[0], active, out=out_up)
        return out


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, labels_N: torch.Tensor, reduction: int) -> torch.Tensor:
        logp_NV = torch.log_softmax(logits_NV, -1, out=logits_NV)
        loss, weight = torch.ops.aten.nll_loss_forward(logp_NV, labels_N, None, reduction, IGNORED)
        ctx.save_for_backward(logp_NV, labels_N, weight)
        ctx.reduction = reduction
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logp_NV, labels_N, weight = ctx.saved_tensors
        grad_NV = torch.ops.aten.nll_loss_backward(grads[0], logp_NV, labels_N, None, ctx.reduction, IGNORED, weight)
        torch.ops.aten._log_softmax_backward_data.out(grad_NV, logp_NV, -1, logp_NV.dtype, out=grad_NV)
        return grad_NV, None, None


def cross_entropy_(logits_NV: torch.Tensor, labels_N: torch.Tensor, reduction: Literal["none", "mean"]) -> torch.Tensor:
    """`F.cross_entropy` of float32 logits in nats, which it **overwrites** with log-probabilities; -100 is not counted.

    Of the four tensors as large as the logits that torch makes on the way to the gradient, two are left. For a small
    model with a large vocabulary their pages cost as much as its attention.
    """
    return _CrossEntropy.apply(logits_NV, labels_N, ("none", "mean").index(reduction))  # pyright: ignore[reportReturnType]


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """[..., 2 * ffn] -> [..., ffn]; a function, because Megatron's MLP would look for the state of a module."""
    return SwiGLU.apply(gate_up)  # pyright: ignore[reportReturnType]
