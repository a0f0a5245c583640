"""The paired one-rollout test: one policy, one optimiser state, one rollout, every rule.

A run trains `rollouts_before` rollouts under its base rule. Then, for each of `probes` fresh rollouts, every rule
starts from the same weights and optimiser state, makes its updates on that same rollout, and the entropy on a fixed
probe batch is measured before and after. The differences between rules have far less noise than full runs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from shared.engines.native import NativeEngine
from shared.experiment.contracts import Interrupted, RunContext
from shared.rl.config import RLConfig
from shared.rl.learner import Learner
from shared.rl.mechanism import BranchObserver, mechanism_summary
from shared.rl.rollout import Collector, RolloutBatch
from shared.rl.trainer import warm_policy
from shared.training.checkpoint import Checkpoints


@dataclass(frozen=True)
class PairedConfig:
    """base: how the policy is trained before the test. rules: name -> fields of `base` that the rule replaces.

    contrasts: name -> {rule: coefficient}, logged as `diff_<name>` per probe rollout.
    """

    base: RLConfig
    rollouts_before: int
    probes: int
    rules: Mapping[str, Mapping[str, Any]]
    contrasts: Mapping[str, Mapping[str, float]]
    probe_prompts: int = 64


def trained_policy(run: RunContext, config: RLConfig, rollouts: int, total: int) -> tuple[Learner, Collector]:
    """Learner and collector after `rollouts` rollouts under the base rule; resumes from and saves to checkpoints.

    `total` counts these rollouts and the probes that follow, for the progress.
    """
    model = warm_policy(config, run)
    learner = Learner(config, model)
    collector = Collector(config, NativeEngine(model, config.task.eos_id, config.task.pad_id), run.seed)
    checkpoints = Checkpoints(run.checkpoints)
    found = checkpoints.latest()
    first = 0
    if found is not None:
        first, state = found
        learner.load(state)
    for rollout in range(first, rollouts):
        batch, _ = collector.collect(rollout)
        if batch is not None:
            learner.update(batch, seed=run.seed, rollout=rollout)
        done, stop = rollout + 1, run.stop_requested()
        if stop or done == rollouts or done % config.checkpoint_every == 0:
            checkpoints.save(done, learner.state())
        run.progress(done, total)
        if stop:
            raise Interrupted(f"stopped after {done} of {rollouts} preparing rollouts")
    return learner, collector


def paired_test(run: RunContext) -> dict[str, Any]:
    """Run function: one row per probe rollout with `change_<rule>` and `diff_<contrast>`, nats per rollout."""
    config: PairedConfig = run.config
    total = config.rollouts_before + config.probes
    learner, collector = trained_policy(run, config.base, config.rollouts_before, total)
    start = copy.deepcopy(learner.state())
    probe = _probe_batch(config, collector)
    before = _entropy(learner, probe)
    for index in range(len(run.rows()), config.probes):
        row = {"entropy_before": before} | _one_rollout(
            config, learner, collector, start, probe, before, run.seed, index
        )
        run.log(index, **row)
        run.progress(config.rollouts_before + index + 1, total)
        if run.stop_requested() and index + 1 < config.probes:
            raise Interrupted(f"stopped after probe {index}")
    rows = run.rows()
    names = sorted({name for row in rows for name in row} - {"step"})
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}


def _one_rollout(config: PairedConfig, learner, collector, start, probe, before, seed, index) -> dict[str, float]:
    rollout = config.rollouts_before + index
    batch, metrics = collector.collect(rollout)
    change: dict[str, float] = {}
    row = {"reward": metrics["reward"]}
    for name, fields in config.rules.items():
        learner.config = replace(config.base, **fields)
        if batch is not None:
            measured = learner.update(batch, seed=seed, rollout=rollout)
            if name == next(iter(config.rules)):
                kept = (
                    "clip_low",
                    "clip_high",
                    "lp_low",
                    "lp_high",
                    "first_order_low",
                    "first_order_high",
                    "positive_share",
                )
                row |= {key: measured[key] for key in kept if key in measured}
        change[name] = _entropy(learner, probe) - before
        learner.load(copy.deepcopy(start))
    row |= {f"change_{name}": value for name, value in change.items()}
    for name, weights in config.contrasts.items():
        row[f"diff_{name}"] = sum(weight * change[rule] for rule, weight in weights.items())
    return row


def _probe_batch(config: PairedConfig, collector: Collector) -> RolloutBatch:
    """Responses of the trained policy to fixed prompts of a rollout number that training never reaches."""
    probing = replace(
        config.base, dynamic_sampling="off", gen_prompts=config.probe_prompts, prompts=config.probe_prompts
    )
    batch, _ = Collector(probing, collector.engine, collector.seed).collect(10**6)
    assert batch is not None
    return batch


def _entropy(learner: Learner, probe: RolloutBatch) -> float:
    _, entropy_BT = learner.score(probe)
    return float(entropy_BT.double().sum().cpu() / probe.mask_BT.sum())


@dataclass(frozen=True)
class MechanismConfig:
    """base: the rule that trains throughout. `probes` rollouts after `rollouts_before` are observed."""

    base: RLConfig
    rollouts_before: int
    probes: int


def mechanism_run(run: RunContext) -> dict[str, Any]:
    """Run function: train, then log the branch sums of `probes` further rollouts of the base rule."""
    config: MechanismConfig = run.config
    run.rewind(-1)
    total = config.rollouts_before + config.probes
    learner, collector = trained_policy(run, config.base, config.rollouts_before, total)
    observer = BranchObserver(config.base.eps_low, config.base.eps_high)
    for index in range(config.probes):
        batch, metrics = collector.collect(config.rollouts_before + index)
        if batch is not None:
            learner.update(batch, seed=run.seed, rollout=config.rollouts_before + index, observe=observer.observe)
        run.log(index, reward=metrics["reward"], **observer.row())
        run.progress(config.rollouts_before + index + 1, total)
        if run.stop_requested() and index + 1 < config.probes:
            raise Interrupted(f"stopped after probe {index}")
    return mechanism_summary(run)
