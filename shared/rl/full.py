"""Types for a paper's own RL setting: what a cluster run would be given. Torch-free; nothing here starts a run yet.

`python -m papers dryrun PAPER` says what such a run needs and writes its launch files (docs/dryrun.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from shared.megatron.config import ModelConfig
from shared.megatron.layout import Layout


@dataclass(frozen=True)
class Cluster:
    """The paper's machines and trainer. `sequence_parallel` is the degree of Ulysses-style sequence parallelism."""

    nodes: int
    gpus_per_node: int
    backend: str
    sequence_parallel: int = 1


@dataclass(frozen=True)
class Validation:
    """Sampling and metric of the paper's evaluation; `samples` responses per problem are averaged (avg@n)."""

    benchmarks: tuple[str, ...]
    samples: int
    temperature: float
    top_p: float
    max_response_tokens: int


@dataclass(frozen=True)
class FullRL:
    """A paper's RL run. Hub ids name model and data; lengths are in tokens, batches in prompts.

    `gen_prompts` prompts x `samples` responses are generated, groups of equal accuracy dropped without refill, the
    first `train_prompts` groups kept; `minibatch_prompts` prompts make one optimiser step. Everything is the paper's
    but `layout`, the Megatron ranks that we would train on, and `rollout_nodes`, how many
    of the cluster's nodes we would give to generation.
    """

    model: str
    architecture: ModelConfig
    data: str
    reward: str
    loss: str
    loss_fields: dict[str, Any]
    positive_coef: float
    aggregation: str
    gen_prompts: int
    train_prompts: int
    minibatch_prompts: int
    samples: int
    temperature: float
    top_p: float
    max_prompt_tokens: int
    max_response_tokens: int
    lr: float
    warmup_steps: int
    weight_decay: float
    grad_clip: float
    epochs: int
    max_steps: int
    cluster: Cluster
    layout: Layout
    rollout_nodes: int
    validation: Validation
    unsure: tuple[str, ...] = field(default_factory=tuple)
