import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers.cegppo.method import ce_gppo_loss
from papers.klear_gppo.method import gppo_loss
from shared.rl.losses import PPOClip
from tests.rl import oracle

BETAS = [(0.5, 1.0), (0.75, 1.0), (1.0, 1.0), (1.0, 0.5), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)]


def loss(inputs, **kw):
    return ce_gppo_loss(inputs.logp_BT, inputs.logp_old_BT, inputs.advantages_BT, **kw)


def gradient(out, inputs):
    return torch.autograd.grad(out.loss_BT.sum(), inputs.logp_BT)[0]


@pytest.mark.parametrize(("beta1", "beta2"), BETAS)
@pytest.mark.parametrize("eps_high", [0.2, 0.28])
def test_equals_the_naive_reference_in_float64(grid, beta1, beta2, eps_high):
    pairs, inputs = grid
    out = loss(inputs, beta1=beta1, beta2=beta2, eps_high=eps_high)
    grad = gradient(out, inputs)[0].tolist()
    for (r, a), value, weight, g in zip(pairs, out.loss_BT[0].tolist(), out.weight_BT[0].tolist(), grad, strict=True):
        if any(math.isclose(r, bound) for bound in (0.8, 1 + eps_high)):
            continue
        want = oracle.ce_gppo(r, a, beta1, beta2, 0.2, eps_high, 10.0)
        assert value == pytest.approx(want[0], abs=1e-12)
        assert -g == pytest.approx(want[1] * a, abs=1e-12)
        if a:
            assert weight == pytest.approx(want[1], abs=1e-12)


@pytest.mark.parametrize(
    ("r", "a", "value", "weight"),
    [
        (0.5, -1, 0.4, 0.4),
        (1.5, 1, -1.28, 1.28),
        (0.5, 1, -0.5, 0.5),
        (1.5, -1, 1.5, 1.5),
        (12, -1, 10, 0),
        (1.1, 1, -1.1, 1.1),
    ],
)
def test_f_table_of_the_sheet(r, a, value, weight):
    logp_BT = torch.tensor([[math.log(r)]], dtype=torch.float64, requires_grad=True)
    adv_BT = torch.full((1, 1), float(a), dtype=torch.float64)
    out = ce_gppo_loss(logp_BT, torch.zeros_like(adv_BT), adv_BT, beta1=0.5, beta2=1.0, eps_high=0.28)
    assert (out.loss_BT.item(), out.weight_BT.item()) == pytest.approx((value, weight))


def test_strict_inequalities_a_ratio_on_the_bound_keeps_weight_r():
    logp_BT = torch.tensor([[math.log(2.0), math.log(0.5)]], dtype=torch.float64, requires_grad=True)
    r = logp_BT.exp().tolist()[0]
    adv_BT = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    out = ce_gppo_loss(
        logp_BT, torch.zeros_like(adv_BT), adv_BT, beta1=0.0, beta2=0.0, eps_low=1 - r[1], eps_high=r[0] - 1
    )
    assert out.weight_BT[0].tolist() == pytest.approx(r)
    assert not (out.low_BT | out.high_BT).any()


def test_betas_one_equal_gppo_and_betas_zero_have_ppo_clips_gradient(random_inputs):
    for seed in range(20):
        inputs = random_inputs(seed, scale=1.2)
        gppo = gppo_loss(inputs.logp_BT, inputs.logp_old_BT, inputs.advantages_BT, eps_high=0.2)
        ones = loss(inputs, beta1=1.0, beta2=1.0)
        torch.testing.assert_close(ones.loss_BT, gppo.loss_BT)
        torch.testing.assert_close(gradient(ones, inputs), gradient(gppo, inputs))
        ppo = PPOClip(0.2, 0.2, 10.0).per_token(inputs)
        torch.testing.assert_close(gradient(loss(inputs, beta1=0.0, beta2=0.0), inputs), gradient(ppo, inputs))


@settings(max_examples=30, deadline=None)
@given(b=st.tuples(*[st.floats(0, 2) for _ in range(4)]), t=st.floats(0, 1), seed=st.integers(0, 99))
def test_gradient_is_linear_in_the_betas(b, t, seed):
    g = torch.Generator().manual_seed(seed)
    logp_BT = torch.randn(3, 4, generator=g, dtype=torch.float64).requires_grad_()
    adv_BT, old_BT = torch.randn(3, 4, generator=g, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64)

    def grad(beta1, beta2):
        out = ce_gppo_loss(logp_BT, old_BT, adv_BT, beta1=beta1, beta2=beta2)
        return torch.autograd.grad(out.loss_BT.sum(), logp_BT)[0]

    mixed = grad(t * b[0] + (1 - t) * b[2], t * b[1] + (1 - t) * b[3])
    torch.testing.assert_close(mixed, t * grad(b[0], b[1]) + (1 - t) * grad(b[2], b[3]))


def test_clipped_gradient_does_not_depend_on_the_ratio():
    r_N = torch.tensor([0.7, 0.3, 0.01, 1.3, 2.0, 9.0], dtype=torch.float64)
    adv_BT = torch.tensor([[-1.0, -1, -1, 1, 1, 1]], dtype=torch.float64)
    logp_BT = r_N.log()[None].requires_grad_()
    out = ce_gppo_loss(logp_BT, torch.zeros_like(adv_BT), adv_BT, beta1=0.5, beta2=0.9)
    grad = torch.autograd.grad(out.loss_BT.sum(), logp_BT)[0]
    assert grad[0].tolist() == pytest.approx([0.4, 0.4, 0.4, -1.08, -1.08, -1.08])


@settings(max_examples=30, deadline=None)
@given(k=st.floats(0.01, 100), seed=st.integers(0, 99))
def test_scaling_the_advantage_scales_loss_and_gradient(k, seed):
    g = torch.Generator().manual_seed(seed)
    logp_BT = torch.randn(3, 4, generator=g, dtype=torch.float64).requires_grad_()
    adv_BT, old_BT = torch.randn(3, 4, generator=g, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64)
    one, many = ce_gppo_loss(logp_BT, old_BT, adv_BT), ce_gppo_loss(logp_BT, old_BT, k * adv_BT)
    torch.testing.assert_close(many.loss_BT, k * one.loss_BT)


def test_first_mini_batch_is_reinforce_whatever_the_betas(random_inputs):
    inputs = random_inputs(0, scale=0.0)
    for beta1, beta2 in BETAS:
        torch.testing.assert_close(-gradient(loss(inputs, beta1=beta1, beta2=beta2), inputs), inputs.advantages_BT)


def test_nothing_but_logp_is_differentiated():
    tensors = [torch.randn(2, 3, requires_grad=True) for _ in range(3)]
    ce_gppo_loss(*tensors).loss_BT.sum().backward()
    assert tensors[0].grad is not None
    assert tensors[1].grad is None
    assert tensors[2].grad is None
