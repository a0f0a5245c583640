"""One rollout: prompts, samples, verdicts, rewards, group advantages, dynamic sampling, padded tensors."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.engines.contracts import Engine, Rollouts, Sampling
from shared.rl.advantages import group_advantages, mixed_groups
from shared.rl.config import RLConfig
from shared.rl.ranks import concatenate


@dataclass(frozen=True)
class RolloutBatch:
    """B = kept groups x samples responses, group by group.

    tokens_BL: prompt then response, right-padded, int64. prompt_len_B. response_BT: response tokens incl. EOS,
    right-padded. mask_BT, logp_rollout_BT, advantages_B, reward_B: float32.
    """

    tokens_BL: Tensor
    prompt_len_B: Tensor
    response_BT: Tensor
    mask_BT: Tensor
    logp_rollout_BT: Tensor
    advantages_B: Tensor
    reward_B: Tensor

    def __len__(self) -> int:
        return len(self.reward_B)

    def rows(self, index: Tensor) -> RolloutBatch:
        """The sub-batch of the given rows."""
        return RolloutBatch(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    def to(self, device: torch.device) -> RolloutBatch:
        """The batch on a device; itself if it is there already."""
        return RolloutBatch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def pad_batch(
    prompts: list[list[int]], rollouts: Rollouts, adv_B: Tensor, reward_B: Tensor, pad_id: int
) -> RolloutBatch:
    """Lay prompts and their responses out as one right-padded batch; `prompts` has one entry per response."""
    lengths_B = rollouts.lengths_N
    width = int(lengths_B.max())
    prompt_len_B = torch.tensor([len(p) for p in prompts])
    tokens_BL = torch.full((len(prompts), int((prompt_len_B + lengths_B).max())), pad_id)
    mask_BT = (torch.arange(width) < lengths_B[:, None]).float()
    response_BT = rollouts.tokens_NT[:, :width]
    for row, prompt in enumerate(prompts):
        n = int(lengths_B[row])
        tokens_BL[row, : len(prompt)] = torch.tensor(prompt)
        tokens_BL[row, len(prompt) : len(prompt) + n] = response_BT[row, :n]
    return RolloutBatch(
        tokens_BL, prompt_len_B, response_BT, mask_BT, rollouts.logprobs_NT[:, :width] * mask_BT, adv_B, reward_B
    )


class Collector:
    """Draws prompts from the RL pool and turns samples into a `RolloutBatch`.

    The draw of rollout k depends on (seed, k) alone, so all arms of a seed see the same prompts and uniforms.
    """

    def __init__(self, config: RLConfig, engine: Engine, seed: int) -> None:
        self.config, self.engine, self.seed = config, engine, seed
        self.pool = config.task.problems("rl", config.pool, seed=0)

    def collect(self, rollout: int) -> tuple[RolloutBatch | None, dict[str, float]]:
        """The batch of one rollout (None when every group was dropped) and its metrics over all samples."""
        c = self.config
        rng = np.random.default_rng([self.seed, 11, rollout])
        kept: list[tuple[list[list[int]], Rollouts, Tensor]] = []
        tally = _Tally()
        groups = 0
        for attempt in range(c.max_gen_batches):
            picks = rng.choice(len(self.pool), size=c.gen_prompts, replace=False)
            problems = [self.pool[i] for i in picks]
            prompts = [c.task.prompt(problem) for problem in problems]
            sampling = Sampling(max_new_tokens=c.task.max_response_len, temperature=c.temperature)
            seed = _engine_seed(self.seed, rollout, attempt)
            samples = self.engine.generate(prompts, sampling, c.samples, seed=seed).cpu()
            accuracy_GN = self._verify(problems, samples, tally)
            keep_G = mixed_groups(accuracy_GN)
            if c.dynamic_sampling == "off":
                keep_G = torch.ones_like(keep_G)
            rows = keep_G.repeat_interleave(c.samples).nonzero().flatten()
            kept.append(([prompts[int(i) // c.samples] for i in rows], samples.select(rows), accuracy_GN[keep_G]))
            groups += int(keep_G.sum())
            if groups >= c.prompts:
                break
        metrics = tally.metrics() | {"groups_kept": float(min(groups, c.prompts))}
        return self._batch(kept, min(groups, c.prompts)), metrics

    def _verify(self, problems: list[Any], samples: Rollouts, tally: _Tally) -> Tensor:
        c = self.config
        accuracy_N = torch.zeros(len(samples.lengths_N))
        tokens = samples.tokens_NT.tolist()
        for row, length in enumerate(samples.lengths_N.tolist()):
            verdict = c.task.verify(problems[row // c.samples], tokens[row][:length])
            accuracy_N[row] = float(verdict.correct)
            tally.reasons[verdict.reason] += 1
        tally.add(accuracy_N.view(-1, c.samples), samples, c)
        return accuracy_N.view(-1, c.samples)

    def _batch(self, kept, groups: int) -> RolloutBatch | None:
        c = self.config
        if not groups:
            return None
        accuracy_GN = torch.cat([part[2] for part in kept])[:groups]
        reward_GN = torch.where(accuracy_GN > 0, c.reward_correct, c.reward_wrong)
        adv_GN = group_advantages(reward_GN, scale_by_std=c.scale_by_std)
        prompts = [prompt for part in kept for prompt in part[0]][: groups * c.samples]
        samples = concatenate([part[1] for part in kept], c.task.pad_id).select(torch.arange(groups * c.samples))
        return pad_batch(prompts, samples, adv_GN.flatten(), reward_GN.flatten(), c.task.pad_id)


class _Tally:
    """Means over every sample generated for a rollout, dropped groups included."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self.accuracy: list[Tensor] = []
        self.lengths: list[Tensor] = []
        self.truncated: list[float] = []

    def add(self, accuracy_GN: Tensor, samples: Rollouts, config: RLConfig) -> None:
        self.accuracy.append(accuracy_GN)
        self.lengths.append(samples.lengths_N.float())
        self.truncated += [float(reason == "length") for reason in samples.finish_reason_N]

    def metrics(self) -> dict[str, float]:
        accuracy_GN, lengths_N = torch.cat(self.accuracy), torch.cat(self.lengths)
        total = sum(self.reasons.values())
        row = {
            "reward": float(accuracy_GN.mean()),
            "reward_spread": float(accuracy_GN.std(1).mean()) if accuracy_GN.shape[1] > 1 else 0.0,
            "pass_at_n": float(accuracy_GN.amax(1).mean()),
            "length_mean": float(lengths_N.mean()),
            "length_max": float(lengths_N.max()),
            "truncated": float(np.mean(self.truncated)),
        }
        return row | {f"reason_{name}": count / total for name, count in sorted(self.reasons.items())}


def _engine_seed(seed: int, rollout: int, attempt: int) -> int:
    return int(np.random.SeedSequence([seed, 12, rollout, attempt]).generate_state(1)[0])
