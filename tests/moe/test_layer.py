"""The layer in one process: how the balancing loss joins the gradient, and when it does not."""

from dataclasses import replace

import pytest
import torch

from shared.megatron.model import build_chunks
from shared.moe.layer import MoELayer, UnknownTokenWeight, take_aux_loss, token_weight
from shared.moe.router import count_assignments, load_balancing_loss, top_k_route
from tests.moe.models import MODEL

COEFF, EXPERTS, TOP_K = 0.3, MODEL.moe.num_experts, MODEL.moe.top_k


def make_layer(aux_loss_coeff: float = COEFF, dtype: torch.dtype = torch.float32) -> MoELayer:
    config = replace(MODEL, moe=replace(MODEL.moe, aux_loss_coeff=aux_loss_coeff), init_std=0.3)
    return build_chunks(config, 0, "cpu", dtype=dtype)[0].decoder.layers[0].mlp


def random_hidden(sequence: int, batch: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(sequence, batch, MODEL.hidden_size, generator=torch.Generator().manual_seed(seed))


def balancing_loss(layer: MoELayer, hidden_SBH: torch.Tensor) -> torch.Tensor:
    logits_TE = layer.router(hidden_SBH.flatten(0, 1))
    return load_balancing_loss(logits_TE, count_assignments(top_k_route(logits_TE, TOP_K, True)[1], EXPERTS))


def test_gradient_is_that_of_mean_loss_plus_mean_balancing_loss() -> None:
    """Over micro-batches of unequal size, whose tokens all weigh the same."""
    ours, explicit = make_layer(), make_layer(aux_loss_coeff=0.0)
    explicit.load_state_dict(ours.state_dict())
    microbatches = [random_hidden(5, 2), random_hidden(3, 2, seed=2)]
    tokens = 16
    for hidden_SBH in microbatches:
        with token_weight(1 / tokens):
            (ours(hidden_SBH)[0].square().sum() / tokens).backward()
        share = hidden_SBH.shape[0] * hidden_SBH.shape[1] / tokens
        loss = explicit(hidden_SBH)[0].square().sum() / tokens
        (loss + COEFF * share * balancing_loss(explicit, hidden_SBH)).backward()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, explicit.get_parameter(name).grad, atol=1e-6, rtol=1e-5)
    without = make_layer(aux_loss_coeff=0.0)
    (without(microbatches[0])[0].square().sum() / tokens).backward()
    assert not torch.allclose(ours.router.weight.grad, without.router.weight.grad, atol=1e-3)


def test_backward_without_a_token_weight_is_refused() -> None:
    hidden_SBH = random_hidden(5, 2)
    with pytest.raises(UnknownTokenWeight, match="token_weight"):
        make_layer()(hidden_SBH)[0].sum().backward()
    make_layer(aux_loss_coeff=0.0)(hidden_SBH)[0].sum().backward()
    make_layer().eval()(hidden_SBH)[0].sum().backward()
    with token_weight(1.0):
        pass
    with pytest.raises(UnknownTokenWeight):
        make_layer()(hidden_SBH)[0].sum().backward()


def test_balancing_loss_is_logged_once_per_training_pass() -> None:
    layer, hidden_SBH = make_layer(), random_hidden(5, 2)
    expected = balancing_loss(layer, hidden_SBH).item()
    with torch.no_grad():
        layer(hidden_SBH)
    layer.eval()(hidden_SBH)
    layer.train()
    for _ in range(2):
        layer(hidden_SBH)
    assert take_aux_loss([layer], microbatches=2) == pytest.approx(expected)
    assert take_aux_loss([layer], microbatches=2) == 0
    assert take_aux_loss([torch.nn.Linear(1, 1)], microbatches=2) is None


def test_routing_stays_in_float32_in_a_bfloat16_model() -> None:
    half = make_layer(dtype=torch.bfloat16)
    single = make_layer()
    single.load_state_dict(half.state_dict())
    hidden_SBH = random_hidden(50, 4).bfloat16()
    assert torch.equal(half.router(hidden_SBH), single.router(hidden_SBH.float()))
    out_SBH, bias = half(hidden_SBH)
    assert out_SBH.dtype == torch.bfloat16
    assert bias is None
    torch.testing.assert_close(out_SBH.float(), single(hidden_SBH.float())[0], atol=0.05, rtol=0.05)
