"""The runs that are killed: toy sizes of everything that trains, each with what an undisturbed run leaves behind.

A subject is `run(folder)`: start, or go on where `folder` stands, and leave a complete result; and `result(folder)`:
the bytes and values that may not depend on how often the run was killed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from shared.data.markov import MarkovText
from shared.data.tasks import get_task
from shared.experiment import artifacts, provenance
from shared.experiment.contracts import Artifact, RunContext
from shared.experiment.records import RunDirectory, read_summary
from shared.megatron.model import ModelConfig, build_model
from shared.rl.trainer import train_rl
from shared.training.checkpoint import Checkpoints, save_weights
from shared.training.pretrain import PretrainConfig, pretrain
from shared.training.sft import SFTConfig, build_sft_policy
from tests.rl.test_learner import FirstTokenEven
from tests.rl.test_learner import config as rl_config

TASK = get_task("plain_countdown")
SFT_MODEL = ModelConfig(1, 16, 2, 1, 8, 24, TASK.vocab_size, 32, qk_layernorm=True)
SFT = SFTConfig(
    SFT_MODEL, TASK, steps=8, pool=40, batch_size=4, warmup_steps=3, eval_problems=2, eval_samples=2, checkpoint_every=3
)
RL = rl_config(
    task=FirstTokenEven(), rollouts=6, dynamic_sampling="drop", prompts=4, samples=2, eval_every=3, checkpoint_every=2
)
PRETRAIN = PretrainConfig(
    ModelConfig(1, 16, 2, 1, 8, 24, 32, 16),
    sequence_length=16,
    global_batch_size=4,
    micro_batch_size=2,
    steps=6,
    lr=1e-2,
    warmup_steps=2,
    checkpoint_every=2,
    eval_every=2,
)
PROVENANCE = {"commit": "c", "claims_hash": "h", "code_hash": "x", "dirty": False}


@dataclass(frozen=True)
class Subject:
    name: str
    run: Callable[[Path], None]
    result: Callable[[Path], dict[str, Any]]


def run_sft(folder: Path) -> None:
    # Hashing all code that the builder reaches takes longer than the toy training, and so does asking git.
    with (
        patch.dict(os.environ, ASSAY_CACHE=str(folder)),
        patch.object(artifacts, "function_hash", lambda _: "code"),
        patch.object(provenance, "collect", lambda **_: dict(PROVENANCE)),
    ):
        artifacts.build(Artifact("warm", build_sft_policy, SFT), "smoke")


def sft_result(folder: Path) -> dict[str, Any]:
    """Content hash over weights, config and evaluation; rows of the training record."""
    (built,) = (folder / "artifacts").glob("warm-*[0-9a-f]")
    found = json.loads((built / "manifest.json").read_text())
    weights = hashlib.sha256((built / "weights.safetensors").read_bytes()).hexdigest()
    assert found["files"]["weights.safetensors"] == weights
    return {**found["files"], "rows": (built / "run" / "metrics.jsonl").read_bytes()}


def warm_start(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    if not (folder / "weights.safetensors").exists():
        save_weights(folder / "weights.safetensors", build_model(RL.model, 3).state_dict())
    return folder


def run_rl(folder: Path) -> None:
    warm = {"warm": warm_start(folder.parent / "warm")}
    with RunDirectory.open(folder / "run", RL, 0, artifacts=warm, provenance=PROVENANCE) as run:
        if run.completed is None:
            summary = train_rl(run)
            run.finish({**summary, "state": digest_of_latest(run.checkpoints)})


def run_result(folder: Path) -> dict[str, Any]:
    """Summary, which holds hashes of weights and optimizer state after the last step; rows."""
    return {"summary": read_summary(folder / "run")["summary"], "rows": (folder / "run/metrics.jsonl").read_bytes()}


def digest_of_latest(folder: Path) -> str:
    """Hash of every tensor and number in the newest checkpoint."""
    found = Checkpoints(folder).latest()
    assert found is not None
    total = hashlib.sha256()

    def add(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key in value:
                add(value[key], f"{name}.{key}")
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                add(item, f"{name}[{index}]")
        else:
            content = value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode()
            total.update(f"{name} ".encode() + content)

    add(found[1], str(found[0]))
    return total.hexdigest()


def run_pretraining(folder: Path) -> None:
    with RunDirectory.open(folder / "run", PRETRAIN, 0, provenance=PROVENANCE) as run:
        if run.completed is None:
            run.finish(pretraining(run))


def pretraining(run: RunContext) -> dict[str, Any]:
    """Run function; any number of ranks."""
    summary = pretrain(run.config, run, MarkovText(vocab_size=32))
    model = hashlib.sha256((run.dir / "model" / "model.safetensors").read_bytes()).hexdigest()
    return {**summary, "state": digest_of_shards(run.checkpoints, run.config.steps), "model": model}


def rl(run: RunContext) -> dict[str, Any]:
    """Run function for several ranks."""
    return {**train_rl(run), "state": digest_of_shards(run.checkpoints, run.config.rollouts)}


def digest_of_shards(folder: Path, step: int) -> dict[str, str]:
    """Checksums of all files with tensors in the checkpoint of that step."""
    (found,) = folder.glob(f"step-{step:08d}-*")
    files = json.loads((found / "manifest.json").read_text())["files"]
    # torch's index of the shards holds a random id.
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".distcp")}


SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject("SFT", run_sft, sft_result),
        Subject("RL", run_rl, run_result),
        Subject("pretraining", run_pretraining, run_result),
    )
}
