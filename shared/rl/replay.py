"""Replay of stored rollouts: the trainer without a sampler, so that its numbers hold on any machine.

The rollout is a function of the seed: correct derivations, each second one with a token replaced, graded by the
task's own verifier and scored by a freshly built model. Canaries use it, since a sampled rollout may differ between
machines by the last bit of a logit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from shared.engines.contracts import Rollouts
from shared.experiment.contracts import Interrupted, RunContext
from shared.megatron.model import build_model, untie
from shared.rl.advantages import group_advantages
from shared.rl.config import RLConfig
from shared.rl.learner import Learner
from shared.rl.rollout import RolloutBatch, pad_batch


def stored_rollout(config: RLConfig, seed: int) -> RolloutBatch:
    """`config.prompts` x `config.samples` graded responses; logprobs of the engine are filled with zeros."""
    task, rng = config.task, np.random.default_rng([seed, 21])
    problems = task.problems("rl", config.prompts, seed)
    prompts, responses, rewards = [], [], []
    for problem in problems:
        for sample in range(config.samples):
            response = task.derivation(problem, rng)
            if sample % 2:
                response[int(rng.integers(len(response) - 1))] = int(rng.integers(task.vocab_size))
            prompts.append(task.prompt(problem))
            responses.append(response)
            correct = task.verify(problem, response).correct
            rewards.append(config.reward_correct if correct else config.reward_wrong)
    reward_B = torch.tensor(rewards)
    adv_B = group_advantages(reward_B.view(-1, config.samples), scale_by_std=config.scale_by_std).flatten()
    width = max(map(len, responses))
    tokens_NT = torch.tensor([row + [task.pad_id] * (width - len(row)) for row in responses])
    lengths_N = torch.tensor([len(row) for row in responses])
    prompt_lengths_N = torch.tensor([len(row) for row in prompts])
    rollouts = Rollouts(
        tokens_NT, torch.zeros(tokens_NT.shape), lengths_N, prompt_lengths_N, ("stop",) * len(responses)
    )
    return pad_batch(prompts, rollouts, adv_B, reward_B, task.pad_id)


def replay(run: RunContext) -> dict[str, Any]:
    """Run function: updates on stored rollouts from a seeded model; one row per rollout."""
    config: RLConfig = run.config
    run.rewind(-1)
    model = build_model(config.model, run.seed)
    learner = Learner(config, untie(model) if config.untie_head else model)
    for rollout in range(config.rollouts):
        batch = stored_rollout(config, 1000 * run.seed + rollout)
        scored_BT, _ = learner.score(batch)
        batch = replace(batch, logp_rollout_BT=scored_BT)
        run.log(rollout, **learner.update(batch, seed=run.seed, rollout=rollout))
        run.progress(rollout + 1, config.rollouts)
        if run.stop_requested():
            raise Interrupted(f"stopped after stored rollout {rollout}")
    return {"entropy_end": run.rows()[-1]["entropy"], "ratio_max": max(row["ratio_max"] for row in run.rows())}
