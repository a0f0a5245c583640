from dataclasses import replace

import numpy as np
import pytest
import torch

from papers.cegppo.experiment import CEGPPO
from shared.rl.advantages import group_advantages
from shared.rl.inputs import LossInputs
from shared.rl.losses import NoClip, PPOClip
from shared.rl.metrics import Meter
from shared.rl.tabular import TabularBandit, TabularConfig, rollout_row

SMALL = TabularConfig(loss=PPOClip(0.2, 0.2, 10.0), groups=32, rollouts=20)


def test_start_entropy_is_zipfs():
    p = 1 / np.arange(1, 33) ** 2.0
    p /= p.sum()
    world = TabularBandit(SMALL, 0)
    assert world.entropy_P().numpy() == pytest.approx(np.full(16, -(p * np.log(p)).sum()), abs=1e-5)
    assert world.entropy_P().mean().item() == pytest.approx(1.470, abs=1e-3)


def test_update_direction_equals_autograd_through_the_loss():
    world = TabularBandit(replace(SMALL, optimizer="sgd", lr=1.0, loss=CEGPPO(0.5, 1.0), entropy_coef=0.01), 1)
    tokens_BP, said_GN = world.sample(0)
    logp_old_BP = world.logp(tokens_BP) + 0.5 * torch.randn(tokens_BP.shape, generator=torch.Generator().manual_seed(0))
    adv_B = group_advantages(2 * said_GN - 1).flatten()
    table_PV = world.table_PV.detach().clone().requires_grad_()
    logp_PV = table_PV.log_softmax(-1)
    logp_BP = logp_PV.gather(1, tokens_BP.T).T
    adv_BP = adv_B[:, None].expand_as(logp_BP)
    loss_BP = CEGPPO(0.5, 1.0).per_token(LossInputs(logp_BP, logp_old_BP, adv_BP, torch.ones_like(logp_BP))).loss_BT
    entropy = -(logp_PV.exp() * logp_PV).sum(-1).mean()
    (loss_BP.mean() - 0.01 * entropy).backward()
    world.update(tokens_BP, logp_old_BP, adv_B, Meter())
    torch.testing.assert_close(world.table_PV.grad, table_PV.grad, atol=1e-6, rtol=1e-4)


def test_samples_follow_the_table_and_the_verifier_errs_as_told():
    world = TabularBandit(replace(SMALL, groups=2000), 2)
    tokens_BP, said_GN = world.sample(0)
    counts_V = torch.bincount(tokens_BP[:, 3], minlength=32) / len(tokens_BP)
    assert (counts_V - world.table_PV[3].softmax(-1)).abs().max() < 0.015
    true = world.true_reward()
    assert said_GN.mean().item() == pytest.approx(0.75 * true + 0.25 * (1 - true), abs=0.015)


def test_arms_of_a_seed_share_world_and_uniforms():
    one, two = TabularBandit(SMALL, 5), TabularBandit(replace(SMALL, loss=NoClip()), 5)
    assert torch.equal(one.table_PV, two.table_PV)
    assert torch.equal(one.sample(3)[0], two.sample(3)[0])
    assert not torch.equal(one.sample(3)[0], one.sample(4)[0])


def test_beta1_lowers_the_end_entropy():
    """The claim's strongest contrast, three seeds that judge nothing: CE(0,1) keeps more entropy than CE(1,0)."""
    for seed in (100, 101, 102):
        ends = []
        for betas in ((0.0, 1.0), (1.0, 0.0)):
            world = TabularBandit(replace(SMALL, loss=CEGPPO(*betas), groups=128), seed)
            for rollout in range(20):
                rollout_row(world, rollout)
            ends.append(world.entropy_P().mean().item())
        assert ends[0] > ends[1] + 0.1
