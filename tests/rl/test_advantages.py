import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.rl.advantages import group_advantages, mixed_groups


def test_hand_computed_group():
    # mean 1/4, Bessel std 0.5: (1 - .25) / .5 = 1.5
    got = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    assert got[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)
    plain = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), scale_by_std=False)
    assert plain[0].tolist() == [0.75, -0.25, -0.25, -0.25]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.floats(-3, 3, width=32), min_size=4, max_size=4), min_size=1, max_size=5),
    st.floats(0.5, 4),
    st.floats(-3, 3),
)
def test_zero_mean_and_affine_invariance(rewards, scale, shift):
    reward_GN = torch.tensor(rewards, dtype=torch.float64)
    reward_GN = reward_GN[reward_GN.std(1) > 0.1]
    adv_GN = group_advantages(reward_GN)
    assert bool((adv_GN.sum(1).abs() < 1e-4).all())
    torch.testing.assert_close(group_advantages(scale * reward_GN + shift), adv_GN, atol=2e-4, rtol=2e-4)


def test_pass_share_and_its_plus_minus_coding_give_the_same_advantages():
    p_GN = torch.rand(5, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(group_advantages(2 * p_GN - 1), group_advantages(p_GN), atol=1e-4, rtol=1e-4)


def test_a_group_of_one_passes_its_reward_through():
    assert group_advantages(torch.tensor([[0.7], [-1.0]])).flatten().tolist() == pytest.approx([0.7, -1.0])


def test_dynamic_sampling_drops_equal_groups_and_keeps_singletons():
    groups = torch.tensor([[1.0, 1, 1], [-1, -1, -1], [1, -1, 1]])
    assert mixed_groups(groups).tolist() == [False, False, True]
    assert mixed_groups(torch.tensor([[1.0], [0.0]])).tolist() == [True, True]
