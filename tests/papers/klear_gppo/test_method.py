import torch

from papers.klear_gppo.method import gppo_loss
from shared.rl.losses import PPOClip


def out_and_gradient(inputs, **kw):
    out = gppo_loss(inputs.logp_BT, inputs.logp_old_BT, inputs.advantages_BT, **kw)
    return out, torch.autograd.grad(out.loss_BT.sum(), inputs.logp_BT)[0]


def test_value_is_ppo_clips_with_dual_clip_everywhere(grid):
    _, inputs = grid
    out, _ = out_and_gradient(inputs)
    torch.testing.assert_close(out.loss_BT, PPOClip(0.2, 0.28, 10.0).per_token(inputs).loss_BT)


def test_gradient_equals_the_weight_column(grid, random_inputs):
    for inputs in (grid[1], random_inputs(1, scale=1.5)):
        for only_high in (False, True):
            out, grad = out_and_gradient(inputs, only_high=only_high)
            torch.testing.assert_close(-grad, out.weight_BT * inputs.advantages_BT)


def test_f_table(grid):
    pairs, inputs = grid
    weights = out_and_gradient(inputs)[0].weight_BT[0].tolist()
    table = dict(zip(pairs, weights, strict=True))
    assert table[0.5, -1.0] == 0.8
    assert table[1.5, 1.0] == 1.28
    assert abs(table[0.5, 1.0] - 0.5) < 1e-12
    assert abs(table[1.5, -1.0] - 1.5) < 1e-12
    assert table[12.0, -1.0] == 0


def test_only_high_drops_the_lower_branch_and_keeps_the_upper(grid):
    pairs, inputs = grid
    both = out_and_gradient(inputs)[1][0].tolist()
    high = out_and_gradient(inputs, only_high=True)[1][0].tolist()
    for (r, a), g_both, g_high in zip(pairs, both, high, strict=True):
        assert g_high == (0 if r < 0.8 - 1e-9 and a < 0 else g_both), (r, a)
