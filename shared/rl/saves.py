"""Checkpoints of an RL run: one file where one process trains, one sharded checkpoint of all ranks where several do.

A run under several ranks may go on under another layout of several, in the same folder. Between one process and
several it may not: the formats differ, and a run must not start anew because its checkpoints were not understood.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from shared.experiment.contracts import AssayError, RunContext
from shared.megatron.init import current_layout
from shared.rl.learner import Learner
from shared.rl.update import ParallelUpdate, adamw
from shared.training.checkpoint import Checkpoints, resume
from shared.training.manifest import Contents


class OtherKindOfCheckpoint(AssayError):
    """A run of one process is to go on with several, or the other way round."""


class Saves(Protocol):
    """Where an RL run keeps its state."""

    def resume(self, learner: Learner) -> int:
        """Bring the learner to the newest state and drop later rows; the rollout to go on with."""
        ...

    def save(self, done: int, learner: Learner) -> None:
        """Keep the state after `done` rollouts."""
        ...

    def describe_latest(self) -> str: ...


def saves_of(run: RunContext) -> Saves:
    """The kind that fits the current layout. Raises `OtherKindOfCheckpoint`."""
    alone = current_layout().world_size == 1
    files, folders = (
        sorted(run.checkpoints.glob("step-*.pt")),
        [p for p in run.checkpoints.glob("step-*") if p.is_dir()],
    )
    if alone and folders:
        raise _other_kind(folders[-1], "several processes", "with a layout of several")
    if not alone and files:
        raise _other_kind(files[-1], "one process", "without a parallel layout")
    return _OneProcess(run) if alone else _AllRanks(run)


def _other_kind(path: Path, writer: str, remedy: str) -> OtherKindOfCheckpoint:
    return OtherKindOfCheckpoint(f"{path} was written by {writer}: go on {remedy}, or choose another folder with --out")


class _OneProcess:
    def __init__(self, run: RunContext) -> None:
        self.run, self.checkpoints = run, Checkpoints(run.checkpoints)

    def resume(self, learner: Learner) -> int:
        step, state = resume(self.run, self.checkpoints)
        if state is not None:
            learner.load(state)
        return step

    def save(self, done: int, learner: Learner) -> None:
        self.checkpoints.save(done, learner.state())

    def describe_latest(self) -> str:
        return self.checkpoints.describe_latest()


class _AllRanks:
    def __init__(self, run: RunContext) -> None:
        # One process need not pay for importing Megatron's checkpointing.
        from shared.training.distributed_checkpoint import DistributedCheckpoints

        self.run, self.checkpoints = run, DistributedCheckpoints(run.checkpoints)

    def resume(self, learner: Learner) -> int:
        from shared.training import distributed_checkpoint

        update = _parallel(learner)
        found = distributed_checkpoint.resume(self.run, self.checkpoints)
        if found is None:
            return 0
        wanted = {**update.parallel.sharded_state(loading=True), "updates": 0}
        contents = self._contents(learner, 0)
        state = self.checkpoints.load(
            found,
            wanted,
            model=contents.model,
            precision=contents.precision,
            optimizer=contents.optimizer,
            data=contents.data,
            seed=contents.seed,
        )
        learner.updates = state.pop("updates")
        update.load_state_dict(state)
        return found.step

    def save(self, done: int, learner: Learner) -> None:
        state = {**_parallel(learner).state_dict(), "updates": learner.updates}
        self.checkpoints.save(done, state, self._contents(learner, done))

    def describe_latest(self) -> str:
        return self.checkpoints.describe_latest()

    def _contents(self, learner: Learner, done: int) -> Contents:
        return Contents(
            model=_parallel(learner).parallel.config,
            layout=current_layout(),
            optimizer=adamw(learner.config.optimizer),
            precision="fp32",
            data=learner.config.task,
            seed=self.run.seed,
            consumed_samples=done * learner.config.gen_prompts,
        )


def _parallel(learner: Learner) -> ParallelUpdate:
    assert isinstance(learner.optimizer, ParallelUpdate)
    return learner.optimizer
