import dataclasses

import pytest
import torch

from shared.rl.aggregate import Denominators, aggregate
from shared.rl.inputs import LossInputs
from shared.rl.losses import NoClip, PPOClip
from shared.rl.pipeline import Terms, policy_loss

MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


def naive(loss_BT, mask_BT, mode, norm):
    rows = [
        [x for x, m in zip(ls, ms, strict=True) if m] for ls, ms in zip(loss_BT.tolist(), mask_BT.tolist(), strict=True)
    ]
    rows = [row for row in rows if row]
    if mode == "token-mean":
        return sum(map(sum, rows)) / sum(map(len, rows))
    if mode == "seq-mean-token-sum":
        return sum(map(sum, rows)) / len(rows)
    if mode == "seq-mean-token-mean":
        return sum(sum(row) / len(row) for row in rows) / len(rows)
    return sum(map(sum, rows)) / norm


@pytest.mark.parametrize("mode", MODES)
def test_aggregation_equals_a_plain_loop_and_skips_empty_sequences(mode, random_inputs):
    inputs = random_inputs(0)
    mask_BT = inputs.mask_BT.clone()
    mask_BT[2] = 0
    got = aggregate(inputs.logp_BT, mask_BT, mode, Denominators.of(mask_BT, norm=54.0))
    assert got.item() == pytest.approx(naive(inputs.logp_BT, mask_BT, mode, 54.0), rel=1e-7)


@pytest.mark.parametrize("mode", MODES)
def test_micro_batches_with_global_counts_add_up_to_the_whole(mode, random_inputs):
    inputs = random_inputs(1)
    counts = Denominators.of(inputs.mask_BT, norm=54.0)
    whole = aggregate(inputs.logp_BT, inputs.mask_BT, mode, counts)
    parts = [aggregate(inputs.logp_BT[i : i + 2], inputs.mask_BT[i : i + 2], mode, counts) for i in (0, 2, 4)]
    assert sum(p.item() for p in parts) == pytest.approx(whole.item(), rel=1e-12)


def test_equal_lengths_make_both_means_equal(random_inputs):
    inputs = random_inputs(2)
    mask_BT = torch.ones_like(inputs.mask_BT)
    both = [
        aggregate(inputs.logp_BT, mask_BT, m, Denominators.of(mask_BT)).item()
        for m in ("token-mean", "seq-mean-token-mean")
    ]
    assert both[0] == pytest.approx(both[1], rel=1e-7)


def test_norm_is_never_guessed_and_a_typo_is_named(random_inputs):
    inputs = random_inputs(2)
    with pytest.raises(ValueError, match="norm"):
        aggregate(inputs.logp_BT, inputs.mask_BT, "seq-mean-token-sum-norm", Denominators.of(inputs.mask_BT))
    with pytest.raises(ValueError, match="tokenmean"):
        aggregate(inputs.logp_BT, inputs.mask_BT, "tokenmean", Denominators.of(inputs.mask_BT))


PLAIN = Terms()
RULE = PPOClip(0.2, 0.2, 10.0)


def run(inputs, terms=PLAIN, **kw):
    result = policy_loss(inputs, RULE, terms, Denominators.of(inputs.mask_BT), **kw)
    return result.loss, torch.autograd.grad(result.loss, inputs.logp_BT)[0]


def test_what_stands_in_the_padding_changes_nothing(random_inputs):
    inputs = random_inputs(4)
    pad_BT = inputs.mask_BT == 0
    noisy = dataclasses.replace(
        inputs,
        logp_BT=torch.where(pad_BT, -17.0, inputs.logp_BT.detach()).requires_grad_(),
        logp_old_BT=torch.where(pad_BT, -1.0, inputs.logp_old_BT),
        advantages_BT=torch.where(pad_BT, 9.0, inputs.advantages_BT),
    )
    loss, grad = run(inputs)
    noisy_loss, noisy_grad = run(noisy)
    assert loss.item() == noisy_loss.item()
    assert torch.equal(grad, noisy_grad)
    assert grad[pad_BT].abs().max() == 0


def test_rollout_weight_multiplies_after_clipping(random_inputs):
    inputs = random_inputs(5)
    _, grad = run(inputs)
    weight_BT = torch.rand_like(inputs.advantages_BT)
    _, weighted = run(inputs, rollout_weight_BT=weight_BT)
    torch.testing.assert_close(weighted, grad * weight_BT)


def test_gradient_mask_keeps_the_value(random_inputs):
    inputs = random_inputs(6)
    loss, grad = run(inputs)
    keep_BT = torch.rand_like(inputs.advantages_BT) > 0.5
    masked_loss, masked = run(inputs, gradient_mask_BT=keep_BT)
    assert masked_loss.item() == loss.item()
    torch.testing.assert_close(masked, grad * keep_BT)


def test_entropy_bonus_is_the_mean_entropy_times_the_coefficient():
    z_BTV = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    logp_BTV = z_BTV.log_softmax(-1)
    entropy_BT = -(logp_BTV.exp() * logp_BTV).sum(-1)
    zeros = torch.zeros(2, 3, dtype=torch.float64)
    inputs = LossInputs(logp_BTV[..., 0], logp_BTV[..., 0].detach(), zeros, torch.ones(2, 3), entropy_BT=entropy_BT)
    loss = policy_loss(inputs, NoClip(), Terms(entropy_coef=0.3), Denominators.of(inputs.mask_BT)).loss
    assert loss.item() == pytest.approx(-0.3 * entropy_BT.mean().item())
    with pytest.raises(ValueError, match="entropy_BT"):
        run(
            dataclasses.replace(inputs, entropy_BT=None, logp_BT=torch.zeros(2, 3, requires_grad=True)),
            Terms(entropy_coef=0.3),
        )


def test_positive_term_is_the_token_mean_nll_of_correct_responses(random_inputs):
    inputs = random_inputs(7)
    positive_B = torch.tensor([True, False, True, False, False, True])
    base, base_grad = run(inputs)
    loss, grad = run(inputs, Terms(positive_coef=0.1), positive_B=positive_B)
    tokens = inputs.mask_BT[positive_B].sum()
    nll = -(inputs.logp_BT * inputs.mask_BT)[positive_B].sum() / tokens
    assert (loss - base).item() == pytest.approx(0.1 * nll.item())
    want = torch.where(positive_B[:, None], -0.1 * inputs.mask_BT / tokens, 0.0)
    torch.testing.assert_close(grad - base_grad, want)


def test_positive_term_without_a_correct_response_is_bitwise_nothing(random_inputs):
    inputs = random_inputs(8)
    none_B = torch.zeros(6, dtype=torch.bool)
    for terms in (Terms(positive_coef=0.1), Terms(positive_coef=0.0)):
        loss, grad = run(inputs, terms, positive_B=none_B)
        base, base_grad = run(inputs)
        assert loss.item() == base.item()
        assert torch.equal(grad, base_grad)
