import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.experiment.contracts import AssayError
from shared.rl.inputs import LossInputs
from shared.rl.losses import CISPO, CISPOCap, NoClip, PPOClip, policy_loss, policy_losses
from tests.rl import oracle

RULES = [
    PPOClip(0.2, 0.2, 10.0),
    PPOClip(0.2, 0.28, 3.0),
    PPOClip(0.2, 0.2, None),
    NoClip(10.0),
    NoClip(),
    CISPO(),
    CISPOCap(),
]


def gradient(rule, inputs: LossInputs) -> torch.Tensor:
    return torch.autograd.grad(rule.per_token(inputs).loss_BT.sum(), inputs.logp_BT)[0]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_autograd_equals_the_weight_column(rule, grid):
    _, inputs = grid
    out = rule.per_token(inputs)
    torch.testing.assert_close(-gradient(rule, inputs), out.weight_BT * inputs.advantages_BT, rtol=1e-12, atol=1e-12)
    assert not out.weight_BT.requires_grad


def values(grid, rule):
    out = rule.per_token(grid[1])
    return zip(grid[0], out.loss_BT[0].tolist(), out.weight_BT[0].tolist(), strict=True)


@pytest.mark.parametrize(("eps_high", "c"), [(0.2, 10.0), (0.28, 3.0)])
def test_ppo_clip_equals_the_naive_reference(grid, eps_high, c):
    for (r, a), loss, weight in values(grid, PPOClip(0.2, eps_high, c)):
        if any(math.isclose(r, bound) for bound in (0.8, 1 + eps_high)):
            continue  # log and exp do not return the bound exactly; the exact case has its own test
        want_loss, want_weight = oracle.ppo_clip(r, a, 0.2, eps_high, c)
        assert loss == pytest.approx(want_loss, abs=1e-12)
        if a:
            assert weight == pytest.approx(want_weight, abs=1e-12), (r, a)


@pytest.mark.parametrize(("r", "a", "loss", "weight"), [(1.5, 1, -1.28, 0), (0.5, -1, 0.8, 0), (12, -1, 10, 0)])
def test_ppo_clip_values_of_the_sheet(r, a, loss, weight):
    logp_BT = torch.tensor([[math.log(r)]], dtype=torch.float64, requires_grad=True)
    inputs = LossInputs(logp_BT, torch.zeros(1, 1).double(), torch.full((1, 1), float(a)).double(), torch.ones(1, 1))
    out = PPOClip(0.2, 0.28, 10.0).per_token(inputs)
    assert out.loss_BT.item() == pytest.approx(loss)
    assert out.weight_BT.item() == weight
    assert gradient(PPOClip(0.2, 0.28, 10.0), inputs).item() == 0


def test_a_token_exactly_on_the_bound_keeps_its_gradient():
    logp_BT = torch.tensor([[math.log(2.0)]], dtype=torch.float64, requires_grad=True)
    inputs = LossInputs(logp_BT, torch.zeros(1, 1).double(), torch.ones(1, 1).double(), torch.ones(1, 1))
    ratio = logp_BT.exp().item()
    assert PPOClip(0.2, ratio - 1, None).per_token(inputs).weight_BT.item() == pytest.approx(2.0)


def test_cispo_equals_the_naive_reference(grid):
    logp = grid[1].logp_BT[0].tolist()
    for ((r, a), loss, weight), lp in zip(values(grid, CISPO(0.2, 0.28)), logp, strict=True):
        want = oracle.cispo(r, a, lp, 0.2, 0.28)
        assert (loss, weight) == pytest.approx(want)


@pytest.mark.parametrize("rule", [r for r in RULES if r != CISPOCap()], ids=repr)
def test_first_mini_batch_has_the_gradient_of_reinforce(rule, random_inputs):
    inputs = random_inputs(3, scale=0.0)
    torch.testing.assert_close(-gradient(rule, inputs), inputs.advantages_BT, rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(k=st.floats(0.01, 50), seed=st.integers(0, 1000))
def test_scaling_the_advantage_scales_loss_and_gradient(k, seed):
    g = torch.Generator().manual_seed(seed)
    logp_BT = torch.randn(2, 5, generator=g, dtype=torch.float64).requires_grad_()
    inputs = LossInputs(logp_BT, torch.zeros(2, 5).double(), torch.randn(2, 5, generator=g).double(), torch.ones(2, 5))
    scaled = LossInputs(logp_BT, inputs.logp_old_BT, k * inputs.advantages_BT, inputs.mask_BT)
    for rule in RULES:
        torch.testing.assert_close(rule.per_token(scaled).loss_BT, k * rule.per_token(inputs).loss_BT)
        torch.testing.assert_close(gradient(rule, scaled), k * gradient(rule, inputs))


def test_far_outside_the_log_clamp_the_loss_is_finite_and_flat():
    logp_BT = torch.tensor([[50.0, -50.0]], dtype=torch.float64, requires_grad=True)
    inputs = LossInputs(logp_BT, torch.zeros(1, 2).double(), torch.ones(1, 2).double(), torch.ones(1, 2))
    assert torch.isfinite(NoClip().per_token(inputs).loss_BT).all()
    assert gradient(NoClip(), inputs).abs().max() == 0


def test_a_name_belongs_to_one_loss():
    assert policy_losses()["ppo_clip"] is PPOClip
    with pytest.raises(AssayError, match="already"):
        policy_loss("ppo_clip")(CISPO)
