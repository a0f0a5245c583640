"""Regime T: a tabular policy, a noisy verifier, real clipping; 60 rollouts in a fraction of a second.

A response is P independent positions over V tokens, one logit table for the whole policy, start logits
-zipf * ln(1 + rank) with a random rank per position. The first `decisions` positions accept `accepted` random tokens
each; a response is truly correct when all decisions are accepted; the verifier says "correct" with probability
`p_true` then and `p_false` otherwise, which stands for one noisy bit about a long answer. Every token's logit is
its own, so the per-softmax entropy identity holds exactly for the whole policy.

The update is the exact policy gradient G - pi * sum(G) of the token-mean of F * A, with F the `weight_BT` of the
rule under test, and the optimiser is torch's. All arms of a seed see the same ranks, accepted tokens, uniforms
and verifier noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from shared.experiment.contracts import NonFinite, RunContext
from shared.rl.advantages import group_advantages, mixed_groups
from shared.rl.inputs import LossInputs
from shared.rl.losses import PolicyLoss
from shared.rl.mechanism import BranchObserver, Observer, mechanism_summary
from shared.rl.metrics import Meter, clip_metrics, entropy_and_surplus
from shared.rl.summary import BRANCH_METRICS, entropy_shape, lp_by_tokens, window_mean


@dataclass(frozen=True)
class TabularConfig:
    """One arm in regime T. `loss` is any registered policy loss; `eps_*` set the range that the metrics count by."""

    loss: PolicyLoss
    positions: int = 16
    vocabulary: int = 32
    zipf: float = 2.0
    decisions: int = 2
    accepted: int = 16
    p_true: float = 0.75
    p_false: float = 0.25
    groups: int = 128
    samples: int = 8
    minibatches: int = 8
    epochs: int = 1
    rollouts: int = 60
    optimizer: Literal["adam", "sgd"] = "adam"
    lr: float = 0.1
    entropy_coef: float = 0.0
    eps_low: float = 0.2
    eps_high: float = 0.2
    matched_reward: float = 0.9


class TabularBandit:
    """World and policy of one seed. `table_PV`: the logits, float32."""

    def __init__(self, config: TabularConfig, seed: int) -> None:
        self.config = config
        rng = np.random.default_rng([seed, 0])
        ranks_PV = np.stack([rng.permutation(config.vocabulary) for _ in range(config.positions)])
        self.table_PV = torch.from_numpy(-config.zipf * np.log1p(ranks_PV)).float().requires_grad_()
        self.accepted_DV = torch.zeros(config.decisions, config.vocabulary, dtype=torch.bool)
        for d in range(config.decisions):
            self.accepted_DV[d, rng.permutation(config.vocabulary)[: config.accepted]] = True
        kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[config.optimizer]
        self.optimizer = kind([self.table_PV], lr=config.lr)
        self.seed = seed

    def sample(self, rollout: int) -> tuple[Tensor, Tensor]:
        """tokens_BP int64 and what the noisy verifier said, accuracy_GN in {0, 1}; B = groups x samples."""
        c = self.config
        rng = np.random.default_rng([self.seed, 1, rollout])
        size = c.groups * c.samples
        uniform_BP = torch.from_numpy(rng.random((size, c.positions), dtype=np.float32))
        noise_B = torch.from_numpy(rng.random(size, dtype=np.float32))
        cumulative_PV = self.table_PV.detach().softmax(-1).cumsum(-1)
        tokens_PB = torch.searchsorted(cumulative_PV, uniform_BP.T.contiguous(), right=True)
        tokens_BP = tokens_PB.clamp_max(c.vocabulary - 1).T.contiguous()
        true_B = torch.ones(size, dtype=torch.bool)
        for d in range(c.decisions):
            true_B &= self.accepted_DV[d, tokens_BP[:, d]]
        said_B = noise_B < torch.where(true_B, c.p_true, c.p_false)
        return tokens_BP, said_B.float().view(c.groups, c.samples)

    def entropy_P(self) -> Tensor:
        """Exact entropy of every position, nats."""
        logp_PV = self.table_PV.detach().log_softmax(-1)
        return -(logp_PV.exp() * logp_PV).sum(-1)

    def true_reward(self) -> float:
        """Exact probability that a response is truly correct."""
        p_DV = self.table_PV.detach()[: self.config.decisions].softmax(-1)
        return float((p_DV * self.accepted_DV).sum(-1).prod())

    def logp(self, tokens_BP: Tensor) -> Tensor:
        """Log-probability of each token, (B, P)."""
        logp_PV = self.table_PV.detach().log_softmax(-1)
        return logp_PV.gather(1, tokens_BP.T).T.contiguous()

    def update(
        self, tokens_BP: Tensor, logp_old_BP: Tensor, adv_B: Tensor, meter: Meter, observe: Observer | None = None
    ) -> None:
        """One optimiser step on one mini-batch; adds its branch metrics to `meter`. `observe` as in the learner."""
        c = self.config
        adv_BP = adv_B[:, None].expand_as(logp_old_BP)
        logp_BP = self.logp(tokens_BP)
        inputs = LossInputs(logp_BP, logp_old_BP, adv_BP, torch.ones_like(logp_BP))
        push_BP = c.loss.per_token(inputs).weight_BT * adv_BP
        p_PV = self.table_PV.detach().softmax(-1)
        gain_PV = torch.zeros_like(p_PV).scatter_add_(1, tokens_BP.T, push_BP.T.contiguous()) / push_BP.numel()
        ascent_PV = gain_PV - p_PV * gain_PV.sum(-1, keepdim=True)
        if c.entropy_coef:
            ascent_PV = ascent_PV - c.entropy_coef / c.positions * p_PV * (p_PV.log() + self.entropy_P()[:, None])
        if not torch.isfinite(ascent_PV).all():
            raise NonFinite("the policy gradient of the tabular bandit is not finite")
        self._measure(tokens_BP, logp_BP, logp_old_BP, adv_BP, meter)
        if observe:
            logp_PV = self.table_PV.detach().log_softmax(-1)
            logp_NV = logp_PV.expand(len(tokens_BP), -1, -1).flatten(0, 1)
            ratio_N = (logp_BP - logp_old_BP).exp().flatten()
            observe(logp_NV, tokens_BP.flatten(), ratio_N, adv_BP.flatten())
        self.table_PV.grad = -ascent_PV
        self.optimizer.step()

    def _measure(self, tokens_BP, logp_BP, logp_old_BP, adv_BP, meter: Meter) -> None:
        c = self.config
        surplus_PV = entropy_and_surplus(self.table_PV.detach().log_softmax(-1))[1]
        surplus_BP = surplus_PV.gather(1, tokens_BP.T).T
        ratio_N = (logp_BP - logp_old_BP).exp().flatten()
        clip_metrics(
            meter, ratio_N, adv_BP.flatten(), surplus_BP.flatten(), logp_old_BP.flatten(), c.eps_low, c.eps_high
        )


def rollout_row(world: TabularBandit, rollout: int, observe: Observer | None = None) -> dict[str, float]:
    """One rollout and its updates; the entropies and rewards are those before the updates."""
    c = world.config
    entropy_P = world.entropy_P()
    tokens_BP, said_GN = world.sample(rollout)
    row = {
        "entropy": float(entropy_P.mean()),
        "free_entropy": float(entropy_P[c.decisions :].mean()),
        "true_reward": world.true_reward(),
        "reward": float(said_GN.mean()),
    }
    meter = Meter()
    keep_G = mixed_groups(said_GN)
    row["groups_kept"] = float(keep_G.sum())
    adv_GN = group_advantages(2 * said_GN - 1)[keep_G]
    tokens_GNP = tokens_BP.view(c.groups, c.samples, -1)[keep_G]
    logp_old_BP = world.logp(tokens_GNP.flatten(0, 1))
    logp_old_GNP = logp_old_BP.view_as(tokens_GNP)
    for _ in range(c.epochs):
        for part in torch.arange(len(adv_GN)).tensor_split(c.minibatches):
            if len(part):
                world.update(
                    tokens_GNP[part].flatten(0, 1),
                    logp_old_GNP[part].flatten(0, 1),
                    adv_GN[part].flatten(),
                    meter,
                    observe,
                )
    return row | meter.means()


def train_tabular(run: RunContext) -> dict[str, Any]:
    """Run function of regime T: `config.rollouts` rollouts, one row each, and the summary of the arm."""
    torch.set_num_threads(1)
    run.rewind(-1)
    world = TabularBandit(run.config, run.seed)
    for rollout in range(run.config.rollouts):
        run.log(rollout, **rollout_row(world, rollout))
        run.progress(rollout + 1, run.config.rollouts)
    return tabular_summary(run.rows(), run.config)


def tabular_summary(rows: list[dict[str, float]], config: TabularConfig) -> dict[str, Any]:
    """End means are over the last five rollouts; matched values at the first rollout with true reward >= the level."""
    last = config.rollouts - 1
    summary: dict[str, Any] = {
        f"{name}_end": window_mean(rows, name, last - 4, last) for name in ("entropy", "free_entropy")
    }
    summary["entropy_start"] = rows[0]["entropy"]
    summary |= entropy_shape(rows[0]["entropy"], summary["entropy_end"])
    summary["entropy_mean"] = window_mean(rows, "entropy", 0, last)
    summary["reward_end"] = window_mean(rows, "true_reward", last - 4, last)
    summary |= {name: window_mean(rows, name, 0, last) for name in BRANCH_METRICS}
    summary |= lp_by_tokens(rows)
    reached = [row for row in rows if row["true_reward"] >= config.matched_reward]
    summary["rollouts_to_reward"] = reached[0]["step"] if reached else None
    summary["entropy_at_reward"] = reached[0]["entropy"] if reached else None
    summary["free_entropy_at_reward"] = reached[0]["free_entropy"] if reached else None
    return summary


def tabular_mechanism(run: RunContext) -> dict[str, Any]:
    """Run function: branch sums of `shared.rl.mechanism` over every rollout of a tabular run."""
    run.rewind(-1)
    world = TabularBandit(run.config, run.seed)
    observer = BranchObserver(run.config.eps_low, run.config.eps_high)
    for rollout in range(run.config.rollouts):
        row = rollout_row(world, rollout, observer.observe)
        run.log(rollout, reward=row["reward"], entropy=row["entropy"], **observer.row())
        run.progress(rollout + 1, run.config.rollouts)
    return mechanism_summary(run)
