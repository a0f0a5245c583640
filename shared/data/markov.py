"""A generated language for pretraining at toy sizes: learnable, endless, and with a known best loss.

text = MarkovText(vocab_size=64)
tokens_RL = text.training(seed=0, step=3, rows=range(8), length=33)
text.entropy_rate                              # nats per token: what a perfect model would reach
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

TRAINING, HELD_OUT = 1, 2


@dataclass(frozen=True)
class MarkovText:
    """First-order Markov chain: every token has `successors` possible next ones, with Dirichlet(1) probabilities.

    `language` is the seed of the chain itself. A sequence is a function of its seed, step and row alone.
    """

    vocab_size: int
    successors: int = 4
    language: int = 0

    @property
    def tokenizer(self) -> None:
        """None: numbers are their own tokens."""

    def training(self, seed: int, step: int, rows: Sequence[int], length: int) -> Tensor:
        """Tokens [rows, length], int64, of the given rows of a training step's global batch."""
        return self._sequences([(TRAINING, seed, step, row) for row in rows], length)

    def held_out(self, rows: Sequence[int], length: int) -> Tensor:
        """Tokens [rows, length], int64, that no training step sees but by chance."""
        return self._sequences([(HELD_OUT, row) for row in rows], length)

    @property
    def entropy_rate(self) -> float:
        """Nats per token under the stationary distribution of the chain."""
        next_VK, cumulative_VK = _chain(self)
        p_VK = np.diff(cumulative_VK, axis=1, prepend=0.0)
        stationary_V = np.full(self.vocab_size, 1.0 / self.vocab_size)
        for _ in range(200):
            following_V = np.zeros(self.vocab_size)
            np.add.at(following_V, next_VK, stationary_V[:, None] * p_VK)
            stationary_V = 0.5 * (stationary_V + following_V)  # lazy: converges for periodic chains too
        return float(-(stationary_V[:, None] * p_VK * np.log(p_VK)).sum())

    def _sequences(self, keys: Sequence[tuple[int, ...]], length: int) -> Tensor:
        next_VK, cumulative_VK = _chain(self)
        uniform_RL = np.stack([np.random.default_rng([self.language, *key]).random(length) for key in keys])
        tokens_RL = np.empty(uniform_RL.shape, dtype=np.int64)
        token_R = (uniform_RL[:, 0] * self.vocab_size).astype(np.int64)
        for position in range(length):
            if position:
                choice_R = (uniform_RL[:, position, None] >= cumulative_VK[token_R, :-1]).sum(1)
                token_R = next_VK[token_R, choice_R]
            tokens_RL[:, position] = token_R
        return torch.from_numpy(tokens_RL)


@lru_cache(maxsize=8)
def _chain(text: MarkovText) -> tuple[np.ndarray, np.ndarray]:
    """Successors [V, K] and their cumulative probabilities [V, K]."""
    rng = np.random.default_rng([text.language, 0])
    next_VK = np.stack([rng.choice(text.vocab_size, text.successors, replace=False) for _ in range(text.vocab_size)])
    return next_VK, np.cumsum(rng.dirichlet(np.ones(text.successors), size=text.vocab_size), axis=1)
