import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.rl.mechanism import BranchObserver, entropy_changes
from shared.rl.metrics import Meter, clip_metrics, entropy_and_surplus, gap_summary, quantile, ratio_summary
from tests.rl.oracle import entropy, softmax


def test_entropy_identity_against_finite_differences():
    g = torch.Generator().manual_seed(0)
    z_NV = 2 * torch.randn(20, 7, generator=g, dtype=torch.float64)
    action_N = torch.randint(0, 7, (20,), generator=g)
    weight_N = torch.randn(20, generator=g, dtype=torch.float64)
    first_N, _, improbable_N = entropy_changes(z_NV.log_softmax(-1), action_N, weight_N)
    eta = 1e-6
    for z, a, w, first, flag in zip(
        z_NV.tolist(), action_N.tolist(), weight_N.tolist(), first_N.tolist(), improbable_N, strict=True
    ):
        p = softmax(z)
        up = [x + eta * w * ((i == a) - p[i]) for i, x in enumerate(z)]
        down = [x - eta * w * ((i == a) - p[i]) for i, x in enumerate(z)]
        moved = (entropy(softmax(up)) - entropy(softmax(down))) / (2 * eta)
        assert first == pytest.approx(moved, rel=1e-5, abs=1e-8)
        assert flag.item() == (first * w > 0)


def test_a_token_below_exp_minus_entropy_is_always_improbable():
    logp_NV = torch.randn(50, 9, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    entropy_N, surplus_NV = entropy_and_surplus(logp_NV)
    rare_NV = logp_NV < -entropy_N[:, None]
    assert rare_NV.any()
    assert (surplus_NV[rare_NV] < 0).all()


def test_uniform_softmax_has_entropy_ln_v_and_no_surplus():
    entropy_N, surplus_NV = entropy_and_surplus(torch.zeros(1, 8).log_softmax(-1))
    assert entropy_N.item() == pytest.approx(math.log(8))
    assert surplus_NV.abs().max() < 1e-6


def test_clip_metrics_count_each_branch_and_sign():
    ratio_N = torch.tensor([0.5, 0.5, 1.5, 1.5, 1.0])
    adv_N = torch.tensor([-1.0, 1.0, 1.0, -1.0, 1.0])
    surplus_N = torch.tensor([-0.1, 0.1, 0.2, 0.1, 0.1])
    meter = Meter()
    clip_metrics(meter, ratio_N, adv_N, surplus_N, torch.full((5,), math.log(0.25)), 0.2, 0.28)
    got = meter.means()
    assert [got[k] for k in ("clip_low", "out_low_pos", "clip_high", "out_high_neg")] == pytest.approx([0.2] * 4)
    assert (got["lp_low"], got["lp_high"]) == (1.0, 0.0)
    assert got["first_order_low"] == pytest.approx(0.8 * -1 * 0.1 / 5)  # -w * surplus, w = 0.8 * -1
    assert got["first_order_high"] == pytest.approx(1.28 * -1 * 0.2 / 5)
    assert got["positive_share"] == pytest.approx(0.6)
    assert got["p_old_low"] == pytest.approx(0.25)


def test_pairs_add_up_over_parts_and_an_empty_share_is_left_out():
    whole, parts = Meter(), Meter()
    for meter, cuts in ((whole, [(0, 6)]), (parts, [(0, 2), (2, 6)])):
        for a, b in cuts:
            x = torch.arange(6.0)[a:b]
            meter.add("x", x.sum(), len(x))
    assert whole.means() == parts.means()
    whole.add("never", 0.0, 0)
    assert "never" not in whole.means()


def test_ratio_and_gap_summaries():
    ratio_N = torch.linspace(0, 2, 101)
    assert ratio_summary(ratio_N) == pytest.approx(
        {"ratio_min": 0, "ratio_mean": 1, "ratio_p95": 1.9, "ratio_max": 2}, abs=1e-6
    )
    gap = gap_summary(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.0]))
    assert (gap["gap_mean"], gap["gap_max"]) == (0.25, 0.5)


def test_observer_splits_branches_by_ratio_and_sign_and_starts_afresh():
    observer = BranchObserver(0.2, 0.2)
    logp_NV = torch.randn(4, 6, generator=torch.Generator().manual_seed(2)).log_softmax(-1)
    action_N = logp_NV.argmin(-1)
    observer.observe(logp_NV, action_N, torch.tensor([0.5, 1.5, 0.5, 1.0]), torch.tensor([-1.0, 1.0, 1.0, -1.0]))
    row = observer.row()
    assert (row["tokens_low"], row["tokens_high"], row["lp_low"], row["lp_high"]) == (1, 1, 1, 1)
    assert row["first_order_low"] < 0 < row["first_order_high"]
    assert row["finite_difference_low"] == pytest.approx(row["first_order_low"], rel=1e-5)
    assert observer.row()["tokens_low"] == 0


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=50), st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_quantile_is_torchs_to_the_bit(values, q):
    values_N = torch.tensor(values, dtype=torch.float64)
    assert quantile(values_N, q) == float(torch.quantile(values_N, q))


@pytest.mark.slow
def test_quantile_takes_more_values_than_torchs():
    assert quantile(torch.zeros(2**24 + 1), 0.95) == 0.0
