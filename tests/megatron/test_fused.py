"""Hand-written gradients against autograd's, to the bit; torch's linear layer in the place of Megatron's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.megatron.fused import IGNORED, Rotate, SplitRotate, SwiGLU, cross_entropy_
from shared.megatron.model import build_model
from tests.megatron.models import LLAMA

sizes = st.integers(1, 5)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def same_to_the_bit(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@settings(max_examples=20, deadline=None)
@given(length=sizes, batch=sizes, groups=sizes, queries=sizes, half=st.integers(1, 20))
def test_split_rotate_is_split_then_rotate(length: int, batch: int, groups: int, queries: int, half: int) -> None:
    angle = drawn(length, 1, 1, half, seed=1).detach().repeat(1, 1, 1, 2)
    cos, sin = angle.cos(), angle.sin()
    mixed = drawn(length, batch, groups, queries + 2, 2 * half)
    query, key, value = mixed.split((queries, 1, 1), 3)
    plain = [Rotate.apply(query.flatten(2, 3), cos, sin), Rotate.apply(key.squeeze(3), cos, sin), value.squeeze(3)]
    ours = list(SplitRotate.apply(mixed, cos, sin))
    assert same_to_the_bit(ours, plain)
    weights = [drawn(*part.shape, seed=2 + i).detach() for i, part in enumerate(plain)]
    assert same_to_the_bit(
        list(torch.autograd.grad(ours, mixed, weights)), list(torch.autograd.grad(plain, mixed, weights))
    )


@settings(max_examples=20, deadline=None)
@given(rows=sizes, width=st.integers(1, 40), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_swiglu_is_silu_of_one_half_times_the_other(rows: int, width: int, dtype: torch.dtype) -> None:
    x = drawn(rows, 3, 2 * width).detach().to(dtype).requires_grad_()
    gate, up = x.chunk(2, -1)
    ours, plain = SwiGLU.apply(x), F.silu(gate) * up
    assert torch.equal(ours, plain)
    weight = drawn(rows, 3, width, seed=1).detach().to(dtype)
    (ours_grad,), (plain_grad,) = torch.autograd.grad(ours, x, weight), torch.autograd.grad(plain, x, weight)
    assert torch.equal(ours_grad, plain_grad)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("width", [3, 64, 300])
def test_cross_entropy_overwrites_the_logits_and_gives_torchs_loss_and_gradient(reduction: Any, width: int) -> None:
    x = drawn(40, width)
    labels = torch.randint(width, (40,), generator=torch.Generator().manual_seed(1))
    labels[::7] = IGNORED
    logits, again = x * 3, x * 3
    ours, theirs = cross_entropy_(logits, labels, reduction), F.cross_entropy(again, labels, reduction=reduction)
    assert torch.equal(ours, theirs)
    assert torch.equal(logits, again.log_softmax(-1))
    weight = drawn(*ours.shape, seed=2).detach()
    for _ in range(2):  # the gradient may be asked for twice
        assert same_to_the_bit(
            list(torch.autograd.grad(ours, x, weight, retain_graph=True)),
            list(torch.autograd.grad(theirs, x, weight, retain_graph=True)),
        )


def test_cross_entropy_refuses_logits_that_autograd_needs() -> None:
    x = drawn(4, 5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cross_entropy_(x.exp(), torch.zeros(4, dtype=torch.int64), "mean").backward()


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_linear_layers_equal_megatrons(qkv_bias: bool) -> None:
    """Every linear layer of a model, with its bias where it has one, against the class that it derives from."""
    model = build_model(replace(LLAMA, qkv_bias=qkv_bias), seed=0, device="cpu")
    layer = model.decoder.layers[0]
    for linear in (layer.self_attention.linear_qkv, layer.self_attention.linear_proj, layer.mlp.linear_fc1):
        x = drawn(5, 2, linear.weight.shape[1])
        (ours, _), (theirs, _) = linear(x), type(linear).__mro__[1].forward(linear, x)
        assert torch.equal(ours, theirs)
        weight = torch.ones_like(ours)
        inputs = (x, linear.weight)
        assert same_to_the_bit(
            list(torch.autograd.grad(ours, inputs, weight)), list(torch.autograd.grad(theirs, inputs, weight))
        )
