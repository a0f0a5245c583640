"""Responses of an engine on a GPU: what the trainer makes of them, it makes in the CPU's memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from shared.engines.contracts import Rollouts, Sampling
from shared.rl.ranks import Rows, SharedEngine
from shared.rl.rollout import Collector
from tests.rl.test_learner import FirstTokenEven, config

CONFIG = config(task=FirstTokenEven())


@dataclass(frozen=True)
class Elsewhere(Rollouts):
    """Tensors without memory, as a stand-in for a GPU's: an operation that mixes them with others raises."""

    home: Rollouts | None = None

    def cpu(self) -> Rollouts:
        assert self.home is not None
        return self.home


class Engine:
    """Answers every prompt with an even token and the end token."""

    def generate(self, prompts, sampling, n, seed) -> Rollouts:
        tokens_NT = torch.tensor([[4, CONFIG.task.eos_id]] * (len(prompts) * n))
        lengths_N, prompt_N = (
            torch.full((len(tokens_NT),), 2),
            torch.tensor([len(p) for p in prompts for _ in range(n)]),
        )
        home = Rollouts(tokens_NT, torch.zeros(tokens_NT.shape), lengths_N, prompt_N, ("stop",) * len(tokens_NT))
        parts = [home.tokens_NT, home.logprobs_NT, home.lengths_N, home.prompt_lengths_N]
        return Elsewhere(*(part.to("meta") for part in parts), home.finish_reason_N, home)

    def load_weights(self, named_tensors) -> None: ...


def test_a_rollout_is_collected_on_the_cpu():
    batch, metrics = Collector(replace(CONFIG, dynamic_sampling="off"), Engine(), seed=0).collect(0)
    assert batch is not None
    assert batch.tokens_BL.device.type == batch.mask_BT.device.type == "cpu"
    assert metrics["length_mean"] == 2


def test_ranks_exchange_responses_on_the_cpu(monkeypatch):
    rows = Rows()
    monkeypatch.setattr(rows, "gather_objects", lambda value: [value])
    found = SharedEngine(Engine(), rows, pad_id=0).generate([[3], [3, 4]], Sampling(2), n=2, seed=0)
    assert found.tokens_NT.device.type == "cpu"
    assert found.prompt_lengths_N.tolist() == [1, 1, 2, 2]
