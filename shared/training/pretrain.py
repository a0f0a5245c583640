"""Pretraining under any parallel layout: one global batch per step, checkpoints of all ranks, resumable anywhere.

    initialize(layout=Layout(dp=2))                # one process needs no such line
    with RunDirectory.open("runs/try", config, seed=config.seed) as run:
        run.finish(pretrain(config, run, MarkovText(vocab_size=64)))

A batch is a function of seed, step and row. So a resumed run needs only its step, and every layout sees the same data:
the same layout goes on bit for bit, another one to rounding. A finished run keeps its weights in `<run>/model`, in
Hugging Face format; its checkpoints go.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from shared.experiment.contracts import AssayError, Interrupted, NonFinite, RunContext
from shared.megatron.config import ModelConfig
from shared.megatron.hf_config import hf_config
from shared.megatron.hf_export import export_hf
from shared.megatron.init import current_layout
from shared.megatron.layout import ImpossibleLayout, Layout
from shared.megatron.optimizer import AdamWConfig
from shared.megatron.parallel import Microbatch, ParallelModel, StepResult
from shared.training.agree import rank
from shared.training.distributed_checkpoint import DistributedCheckpoints, resume
from shared.training.manifest import Contents, Tokenizer
from shared.training.schedules import cosine, wsd

_log = logging.getLogger(__name__)


class BadPretrainConfig(AssayError):
    """Settings of a pretraining run that do not fit together."""


class Batches(Protocol):
    """Training text, cut into sequences. A frozen dataclass: it is printed into checkpoints."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """What made the tokens; None where numbers are their own tokens."""
        ...

    def training(self, seed: int, step: int, rows: Sequence[int], length: int) -> Tensor:
        """Tokens [rows, length], int64, of the given rows of a step's global batch; each row by itself."""
        ...

    def held_out(self, rows: Sequence[int], length: int) -> Tensor:
        """Tokens [rows, length], int64, of the given held-out sequences."""
        ...


@dataclass(frozen=True)
class PretrainConfig:
    """A pretraining run. Nothing in it depends on how many processes run it.

    global_batch_size: sequences per step, of sequence_length predicted tokens each.
    micro_batch_size: sequences that one rank takes at once; the rest is gradient accumulation.
    schedule: the rate rises over warmup_steps to `lr`, then falls to lr * min_lr_fraction: as a cosine, or (wsd) stays
        and falls linearly over the last decay_steps.
    eval_every: steps between evaluations on eval_batches held-out global batches, 0 for only one at the end.
        checkpoint_every has to be a multiple: every checkpoint that is due has a loss (one that a stop request made
        may have none). The checkpoint of lowest loss is kept beside the newest two, until the run is finished.
    """

    model: ModelConfig
    sequence_length: int
    global_batch_size: int
    micro_batch_size: int
    steps: int
    lr: float
    min_lr_fraction: float = 0.1
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: int = 0
    decay_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpoint_every: int = 200
    eval_every: int = 0
    eval_batches: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_numbers()
        if self.sequence_length > self.model.max_sequence_length:
            raise BadPretrainConfig(
                f"sequence_length={self.sequence_length} is longer than the model's max_sequence_length="
                f"{self.model.max_sequence_length}: shorten the sequences, or widen the model"
            )
        if self.warmup_steps + self.decay_steps > self.steps:
            raise BadPretrainConfig(
                f"warmup_steps + decay_steps = {self.warmup_steps + self.decay_steps} are more than steps={self.steps}"
            )
        if self.schedule == "wsd" and not self.decay_steps:
            raise BadPretrainConfig("the wsd schedule needs decay_steps > 0")
        if self.schedule == "cosine" and self.decay_steps:
            raise BadPretrainConfig("the cosine schedule falls over all steps: leave decay_steps at 0, or choose wsd")
        if self.eval_every and self.checkpoint_every % self.eval_every:
            raise BadPretrainConfig(
                f"checkpoint_every={self.checkpoint_every} is not a multiple of eval_every={self.eval_every}: a "
                "checkpoint without an evaluation could not be compared with the best; change one of them"
            )

    def _check_numbers(self) -> None:
        least = dict.fromkeys(("warmup_steps", "decay_steps", "eval_every"), 0)
        least |= dict.fromkeys(("sequence_length", "global_batch_size", "micro_batch_size", "steps"), 1)
        least |= dict.fromkeys(("checkpoint_every", "eval_batches"), 1)
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise BadPretrainConfig(f"{name}={getattr(self, name)} is too small: at least {lowest}")

    @property
    def tokens_per_step(self) -> int:
        """Predicted tokens in one global batch."""
        return self.global_batch_size * self.sequence_length

    def optimizer(self) -> AdamWConfig:
        """The optimizer's part of the config."""
        return AdamWConfig(lr=self.lr, betas=self.betas, weight_decay=self.weight_decay, grad_clip=self.grad_clip)


@dataclass(frozen=True)
class Consumed:
    """What the position of a checkpoint counts: under another batch size or length, a step stands elsewhere."""

    batches: Batches
    global_batch_size: int
    sequence_length: int


def learning_rate(config: PretrainConfig, step: int) -> float:
    """Rate of a step, counted from 0."""
    if config.schedule == "wsd":
        factor = wsd(step, config.warmup_steps, config.decay_steps, config.steps, config.min_lr_fraction)
    else:
        factor = cosine(step, config.warmup_steps, config.steps, config.min_lr_fraction)
    return config.lr * factor


def check(config: PretrainConfig, layout: Layout) -> None:
    """Refuse a layout that cannot run this config. Raises `ImpossibleLayout`."""
    together = config.micro_batch_size * layout.dp
    if config.global_batch_size % together:
        raise ImpossibleLayout(
            f"global_batch_size={config.global_batch_size} is not a multiple of micro_batch_size * dp = {together}: "
            "change one of them"
        )
    layout.check(config.model, config.sequence_length, config.global_batch_size // together)


def microbatches(config: PretrainConfig, sequences: Tensor) -> list[Microbatch]:
    """Cut token sequences [rows, sequence_length + 1] into micro-batches that predict every next token."""
    return [
        Microbatch(part[:, :-1].contiguous(), part[:, 1:].contiguous(), torch.ones(part[:, 1:].shape))
        for part in sequences.split(config.micro_batch_size)
    ]


def own_rows(config: PretrainConfig, layout: Layout, batches: int = 1) -> range:
    """Rows of a global batch (or of `batches` of them) that this data-parallel rank takes: one block each."""
    from megatron.core import parallel_state

    share = batches * config.global_batch_size // layout.dp
    first = parallel_state.get_data_parallel_rank() * share
    return range(first, first + share)


def pretrain(config: PretrainConfig, run: RunContext, batches: Batches) -> dict[str, Any]:
    """Train, or go on from the newest intact checkpoint; all ranks call it. Returns the summary of the run.

    Logs loss (nats per token), grad_norm and lr per step, eval_loss where one is due. Checkpoints are written while
    training goes on. The weights after the last step are left in `run.dir / "model"`, as `export_hf` writes them, in
    the dtype of the config's precision.

    Raises:
        ImpossibleLayout, UnsupportedArchitecture: before anything is built.
        NonFinite: a loss or gradient norm is NaN or Inf; names step, sequences and the last good checkpoint.
        Interrupted: a stop was requested on any rank; a checkpoint is saved.
        CheckpointNotWritten, UnusableCheckpoint: as DistributedCheckpoints raises them.
        ExportNotWritten: the last checkpoint is intact; the next start writes the weights again.
    """
    loop = _Loop(config, run, batches)
    for step in range(loop.resume(), config.steps):
        loop.step(step)
    eval_loss = loop.evaluate()
    loop.export(run.dir / "model")
    return {"eval_loss": eval_loss, "steps": config.steps, "tokens": config.steps * config.tokens_per_step}


class _Loop:
    def __init__(self, config: PretrainConfig, run: RunContext, batches: Batches) -> None:
        self.layout = current_layout()
        check(config, self.layout)
        hf_config(config.model)  # a model that cannot be exported should not train for weeks
        self.config = config
        self.run = run
        self.batches = batches
        self.consumed = Consumed(batches, config.global_batch_size, config.sequence_length)
        self.model = ParallelModel(config.model, config.optimizer(), seed=config.seed, precision=config.precision)
        self.checkpoints = DistributedCheckpoints(run.checkpoints, keep_best=config.eval_every > 0)

    def resume(self) -> int:
        """Step to go on with."""
        found = resume(self.run, self.checkpoints)
        if found is None:
            return 0
        if found.layout != self.layout and rank() == 0:
            _log.warning(
                "Step %d was saved under layout %s: under %s the run goes on equal to rounding, not bit for bit.",
                found.step,
                found.layout,
                self.layout,
            )
        state = self.checkpoints.load(
            found,
            self.model.sharded_state(loading=True),
            model=self.config.model,
            tokenizer=self.batches.tokenizer,
            precision=self.config.precision,
            data=self.consumed,
            seed=self.config.seed,
        )
        self.model.load_sharded_state(state)
        return found.step

    def step(self, step: int) -> None:
        """Train, log, and save what is due."""
        config, run = self.config, self.run
        started = time.perf_counter(), time.process_time()
        result = self.train(step)
        row = {"loss": result.loss, "grad_norm": result.grad_norm, "lr": learning_rate(config, step)}
        if result.aux_loss is not None:
            row["aux_loss"] = result.aux_loss
        wall, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
        done = step + 1
        if config.eval_every and done % config.eval_every == 0:
            row["eval_loss"] = self.evaluate()
        self.refuse_non_finite(step, row)
        run.log(step, **row)
        started = time.perf_counter()
        stop = run.stop_requested()
        last = stop or done == config.steps
        self.checkpoints.poll()
        if last or done % config.checkpoint_every == 0:
            self.save(done, row.get("eval_loss"), asynchronous=not last)
        saving = time.perf_counter() - started
        run.time(step, wall_s=wall, cpu_s=cpu, tokens_per_s=config.tokens_per_step / wall, checkpoint_s=saving)
        run.progress(done, config.steps)
        if stop and done < config.steps:
            raise Interrupted(f"Stopped after step {step} of {config.steps}, checkpoint saved: start again to go on.")

    def train(self, step: int) -> StepResult:
        """One update."""
        config = self.config
        rows = own_rows(config, self.layout)
        sequences = self.batches.training(config.seed, step, rows, config.sequence_length + 1)
        return self.model.train_step(microbatches(config, sequences), learning_rate(config, step))

    def refuse_non_finite(self, step: int, row: Mapping[str, float]) -> None:
        """Raise `NonFinite` on all ranks at once; they have the same values."""
        for name, value in row.items():
            if not math.isfinite(value):
                self.checkpoints.wait()
                last = self.config.global_batch_size - 1
                raise NonFinite(
                    f"Step {step}: {name} is {value} on sequences 0 to {last} of this step "
                    f"(seed {self.config.seed}); last good checkpoint: {self.checkpoints.describe_latest()}."
                )

    def evaluate(self) -> float:
        """Mean loss, nats per token, over the held-out sequences."""
        rows = own_rows(self.config, self.layout, self.config.eval_batches)
        sequences = self.batches.held_out(rows, self.config.sequence_length + 1)
        total, tokens = self.model.evaluate(microbatches(self.config, sequences))
        return total / tokens

    def export(self, path: Path) -> None:
        """Write the weights to the folder `path`, in place of what a run left there that was killed before its end."""
        if rank() == 0 and path.exists():
            aside = path.with_name(f".{path.name}.old")
            shutil.rmtree(aside, ignore_errors=True)
            shutil.rmtree(path.rename(aside))  # a folder under its own name is whole
        export_hf(self.model.chunks, path)

    def save(self, done: int, metric: float | None, asynchronous: bool) -> None:
        """Save the state after `done` steps."""
        config = self.config
        contents = Contents(
            model=config.model,
            layout=self.layout,
            optimizer=config.optimizer(),
            precision=config.precision,
            data=self.consumed,
            seed=config.seed,
            consumed_samples=done * config.global_batch_size,
            tokenizer=self.batches.tokenizer,
        )
        state = self.model.sharded_state()
        self.checkpoints.save(done, state, contents, metric=metric, asynchronous=asynchronous)
