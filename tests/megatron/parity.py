"""One process against other layouts: what the tests assert and the table in docs/parallelism.md shows.

python -m tests.megatron.parity                     # measures every case and writes the table (one CPU-minute)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from shared.experiment.markdown import fill, table
from shared.megatron.config import ModelConfig, MoEConfig
from shared.megatron.layout import Layout
from tests.ranks import run_ranks

PAGE = Path(__file__).parents[2] / "docs" / "parallelism.md"

STEPS, ROWS, LENGTH, MICRO_ROWS, LR = 4, 8, 16, 2, 1e-3

DENSE = ModelConfig(
    num_layers=4,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=8,
    ffn_hidden_size=48,
    vocab_size=64,
    max_sequence_length=LENGTH,
    init_std=0.1,
)
MODELS = {
    "dense, tied": DENSE,
    "dense, untied, qk-norm": replace(DENSE, tie_embeddings=False, qk_layernorm=True),
    "experts": replace(DENSE, num_layers=2, moe=MoEConfig(num_experts=4, top_k=2, moe_ffn_hidden_size=24)),
}

# Thresholds and not numbers, so that the table reads the same on every machine.
CLASSES = (1e-6, 1e-4, 1e-2)


@dataclass(frozen=True)
class Case:
    """A layout that is compared with one process in float32."""

    layout: Layout
    model: str = "dense, tied"
    precision: Literal["fp32", "bf16"] = "fp32"

    @property
    def bound(self) -> float:
        """What is promised of losses in nats per token, and of gradient norms relative to their size."""
        return 1e-6 if self.precision == "fp32" else 1e-2

    def __str__(self) -> str:
        return f"{self.layout}, {self.model}, {self.precision}"


QWEN = "dense, untied, qk-norm"
CASES = (
    Case(Layout(tp=2)),
    Case(Layout(tp=2, sequence_parallel=True)),
    Case(Layout(tp=2, sequence_parallel=True), QWEN),
    Case(Layout(dp=2)),
    Case(Layout(dp=2, distributed_optimizer=True)),
    Case(Layout(dp=2, overlap=True)),
    Case(Layout(dp=2, distributed_optimizer=True, overlap=True)),
    Case(Layout(cp=2)),
    Case(Layout(tp=2, cp=2)),
    Case(Layout(tp=2, cp=2, sequence_parallel=True)),
    Case(Layout(pp=2)),
    Case(Layout(pp=2), QWEN),
    Case(Layout(pp=2, virtual_pp=2)),
    Case(Layout(tp=2, pp=2)),
    Case(Layout(pp=2, dp=2, virtual_pp=2, distributed_optimizer=True, overlap=True)),
    Case(Layout(recompute="full")),
    Case(Layout(recompute="selective")),
    Case(Layout(tp=2, sequence_parallel=True, recompute="full")),
    Case(Layout(dp=2, ep=2), "experts"),
    Case(Layout(dp=2, ep=2, distributed_optimizer=True, overlap=True), "experts"),
    Case(Layout(tp=2, ep=2, sequence_parallel=True), "experts"),
    Case(Layout(tp=2, dp=2, ep=4, sequence_parallel=True), "experts"),
    Case(Layout(pp=2, dp=2, ep=2), "experts"),
    Case(Layout(), precision="bf16"),
    Case(Layout(dp=2, distributed_optimizer=True), precision="bf16"),
    Case(Layout(tp=2, pp=2), precision="bf16"),
)

# Losses and gradient norms of the steps, then loss and number of tokens of an evaluation.
Numbers = tuple[tuple[float, ...], tuple[float, ...], tuple[float, float]]


def train(rank: int, config: ModelConfig, precision: Literal["fp32", "bf16"]) -> Numbers:
    """Four steps over two global batches in turn, cut into micro-batches of two rows, on this rank of the layout."""
    from megatron.core import parallel_state

    from shared.megatron.optimizer import AdamWConfig
    from shared.megatron.parallel import Microbatch, ParallelModel

    model = ParallelModel(config, AdamWConfig(lr=LR), seed=3, precision=precision, device="cpu")
    replicas, replica = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    results, batches = [], []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step % 2)
        text = torch.randint(0, config.vocab_size, (ROWS, LENGTH + 1), generator=generator).chunk(replicas)[replica]
        mask = (torch.rand(ROWS, LENGTH, generator=generator) < 0.7).chunk(replicas)[replica]
        parts = zip(text.split(MICRO_ROWS), mask.split(MICRO_ROWS), strict=True)
        batches = [Microbatch(rows[:, :-1], rows[:, 1:], counted) for rows, counted in parts]
        results.append(model.train_step(batches, LR))
    losses, norms = tuple(r.loss for r in results), tuple(r.grad_norm for r in results)
    return losses, norms, model.evaluate(batches)


@cache
def one_process(model: str) -> Numbers:
    """The reference of every case of this model."""
    return run_ranks(train, Layout(), MODELS[model], "fp32")[0]


@cache
def differences(case: Case) -> tuple[float, float]:
    """Largest difference of a loss, and of a gradient norm relative to its size, over the steps and the evaluation."""
    per_rank = run_ranks(train, case.layout, MODELS[case.model], case.precision)
    assert all(numbers == per_rank[0] for numbers in per_rank), "ranks disagree about losses or gradient norms"
    losses, norms, (loss_sum, tokens) = per_rank[0]
    expected, expected_norms, (expected_sum, expected_tokens) = one_process(case.model)
    assert tokens == expected_tokens
    loss = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    norm = max(abs(a - b) / b for a, b in zip(norms, expected_norms, strict=True))
    return max(loss, abs(loss_sum - expected_sum) / tokens), norm


def parity_table() -> str:
    """Every case with the smallest threshold that its measured differences stay under."""
    rows = []
    for case in CASES:
        loss, norm = differences(case)
        rows.append((str(case.layout), case.model, case.precision, _class(loss), _class(norm)))
    return table(("layout", "model", "precision", "losses differ by", "gradient norms differ by"), rows)


def _class(difference: float) -> str:
    for limit in CLASSES:
        if difference <= limit:
            return f"<= {limit:.0e}"
    return "**more than 1e-02**"


def page() -> str:
    """docs/parallelism.md with the table as just measured."""
    return fill(PAGE.read_text(), str(PAGE), lambda kind, name: parity_table())


if __name__ == "__main__":
    for case in CASES:
        loss, norm = differences(case)
        print(f"{case}: losses {loss:.1e}, gradient norms {norm:.1e}", flush=True)
    PAGE.write_text(page())
