"""Rows of a rollout over data-parallel ranks; with one rank, everything here is the identity.

Every rank holds the whole batch and trains on its rows, with the denominators of the whole. What is measured per token
is put together again, so that metrics, quantiles included, are those of one process.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shared.engines.contracts import Engine, Rollouts, Sampling
from shared.megatron.init import current_layout
from shared.megatron.layout import ImpossibleLayout

FOLLOWS = ("tp", "dp", "sequence_parallel", "distributed_optimizer")
"""Fields of `Layout` that the RL trainer follows."""


def check_layout() -> None:
    """Raises `ImpossibleLayout` if the current layout asks for more than `FOLLOWS`."""
    layout = current_layout()
    for field in fields(layout):
        if field.name not in FOLLOWS and getattr(layout, field.name) != field.default:
            raise ImpossibleLayout(f"the RL trainer does not run under {field.name}: use {', '.join(FOLLOWS)}")


class Rows:
    """Which rows of a batch this rank trains on: contiguous, in rank order, as even as can be."""

    def __init__(self) -> None:
        self.size = current_layout().dp
        self.rank = 0
        if self.size > 1:
            from megatron.core import parallel_state

            self._group: Any = parallel_state.get_data_parallel_group()
            self.rank = dist.get_rank(self._group)

    def mine(self, count: int) -> slice:
        """This rank's part of `count` rows; may be empty."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def gather(self, part: Tensor, count: int) -> Tensor:
        """All `count` rows, on every rank, from each rank's `mine(count)` of them (dimension 0)."""
        if self.size == 1:
            return part
        widest = -(-count // self.size)
        padded = torch.zeros(widest, *part.shape[1:], dtype=part.dtype, device=part.device)
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded, group=self._group)
        bounds = [count * rank // self.size for rank in range(self.size + 1)]
        return torch.cat([p[: end - start] for p, start, end in zip(parts, bounds, bounds[1:], strict=False)])

    def gather_objects(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values


class SharedEngine:
    """An engine whose prompts are dealt out over data-parallel ranks; every rank gets all responses.

    Equal prompts go to one rank, because an engine numbers their samples on. So responses are those of one process.
    """

    def __init__(self, engine: Engine, rows: Rows, pad_id: int) -> None:
        self.engine, self.rows, self.pad_id = engine, rows, pad_id

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, seed: int) -> Rollouts:
        """See `shared.engines.contracts.Engine`."""
        distinct = {key: place for place, key in enumerate(dict.fromkeys(tuple(prompt) for prompt in prompts))}
        place_P = [distinct[tuple(prompt)] for prompt in prompts]
        mine = range(len(distinct))[self.rows.mine(len(distinct))]
        chosen = [i for i, place in enumerate(place_P) if place in mine]
        # On the CPU: a pickled CUDA tensor comes back on the sender's GPU.
        own = self.engine.generate([prompts[i] for i in chosen], sampling, n, seed).cpu() if chosen else None
        parts = [part for part in self.rows.gather_objects((chosen, own)) if part[1] is not None]
        order = torch.tensor([i for indices, _ in parts for i in indices])
        rows_N = (order.argsort()[:, None] * n + torch.arange(n)).flatten()
        return concatenate([part for _, part in parts], self.pad_id).select(rows_N)

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Into this rank's engine."""
        self.engine.load_weights(named_tensors)


def concatenate(parts: Sequence[Rollouts], pad_id: int) -> Rollouts:
    """The rows of several answers one after the other, padded to the longest."""
    width = max(part.tokens_NT.shape[1] for part in parts)

    def widen(tensor_NT: Tensor, value: float) -> Tensor:
        return torch.nn.functional.pad(tensor_NT, (0, width - tensor_NT.shape[1]), value=value)

    return Rollouts(
        torch.cat([widen(part.tokens_NT, pad_id) for part in parts]),
        torch.cat([widen(part.logprobs_NT, 0.0) for part in parts]),
        torch.cat([part.lengths_N for part in parts]),
        torch.cat([part.prompt_lengths_N for part in parts]),
        tuple(reason for part in parts for reason in part.finish_reason_N),
    )
