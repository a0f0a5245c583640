"""Supervised warm start on random correct derivations of a generated task; resumable, bit for bit.

    with RunDirectory.open("runs/sft", config, seed=config.seed) as run:
        model = train_sft(config, run)

`build_sft_policy` is the same as an artifact: weights.safetensors, config.json and eval.json in a folder.
Everything random is a function of the config and the step, so a resumed run needs no generator state.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from shared.data.tasks.base import Task
from shared.experiment.contracts import AssayError, Interrupted, NonFinite, RunContext
from shared.experiment.files import plain, write_json
from shared.experiment.records import RunDirectory
from shared.megatron.fused import IGNORED, cross_entropy_
from shared.megatron.model import ModelConfig, build_model, forward_logits, parameter_count
from shared.rl.evaluate import evaluate_policy, pad_sequences
from shared.training.checkpoint import Checkpoints, resume, save_weights
from shared.training.schedules import linear

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


class ConfigMismatch(AssayError):
    """The model cannot hold the task."""


@dataclass(frozen=True)
class SFTConfig:
    """A warm start. `lr` falls linearly to `final_lr_fraction` of itself after `warmup_steps`.

    pool: derivations drawn once from the "sft" split; each batch draws `batch_size` of them with replacement.
    eval_problems x eval_samples responses at temperature 1 make eval.json.
    """

    model: ModelConfig
    task: Task
    steps: int
    pool: int = 60_000
    batch_size: int = 128
    lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    warmup_steps: int = 50
    final_lr_fraction: float = 0.1
    grad_clip: float = 1.0
    eval_problems: int = 128
    eval_samples: int = 8
    checkpoint_every: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        length = self.task.max_prompt_len + self.task.max_response_len
        if self.model.vocab_size != self.task.vocab_size or self.model.max_sequence_length < length:
            raise ConfigMismatch(
                f"Task {self.task.name!r} needs vocab_size={self.task.vocab_size} and max_sequence_length>={length}, "
                f"the model has {self.model.vocab_size} and {self.model.max_sequence_length}: change the model."
            )


def derivation_pool(config: SFTConfig) -> tuple[Tensor, Tensor]:
    """tokens_PL (int64, prompt and response, right-padded) and response_PL (bool) of the training pool."""
    task = config.task
    rng = np.random.default_rng([config.seed, 1])
    problems = task.problems("sft", config.pool, config.seed)
    prompts = [task.prompt(problem) for problem in problems]
    sequences = [prompt + task.derivation(problem, rng) for prompt, problem in zip(prompts, problems, strict=True)]
    return pad_sequences(sequences, [len(prompt) for prompt in prompts], task.pad_id)


def batch_rows(config: SFTConfig, step: int) -> Tensor:
    """(batch_size,) rows of the pool that a step trains on: a function of seed and step alone."""
    return torch.from_numpy(np.random.default_rng([config.seed, 2, step]).integers(config.pool, size=config.batch_size))


def response_nll(model: GPTModel, tokens_BL: Tensor, response_BL: Tensor) -> Tensor:
    """Mean negative log-likelihood (nats) over the response tokens of the batch, eos included."""
    logits_BTV = forward_logits(model, tokens_BL[:, :-1])
    target_BT = tokens_BL[:, 1:].masked_fill(~response_BL[:, 1:], IGNORED)
    return cross_entropy_(logits_BTV.flatten(0, 1), target_BT.flatten(), "mean")


def train_sft(config: SFTConfig, run: RunContext) -> GPTModel:
    """Train, or go on from the newest intact checkpoint, and return the model. Logs loss, grad_norm and lr per step.

    Raises `NonFinite` before a step with a NaN or Inf is taken, and `Interrupted` after saving a checkpoint when a
    stop was requested.
    """
    model = build_model(config.model, config.seed)
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )
    tokens_PL, response_PL = derivation_pool(config)
    checkpoints = Checkpoints(run.checkpoints)
    first, state = resume(run, checkpoints)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    for step in range(first, config.steps):
        started = time.perf_counter(), time.process_time()
        rows = batch_rows(config, step)
        lr = config.lr * linear(step, config.warmup_steps, config.steps, config.final_lr_fraction)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        loss = response_nll(model, tokens_PL[rows].to(device), response_PL[rows].to(device))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        _refuse_non_finite(step, rows, checkpoints, loss=loss.item(), gradient_norm=norm.item())
        optimizer.step()
        run.log(step, loss=loss.item(), grad_norm=norm.item(), lr=lr)
        run.time(step, wall_s=time.perf_counter() - started[0], cpu_s=time.process_time() - started[1])
        run.progress(step + 1, config.steps)
        done, stop = step + 1, run.stop_requested()
        if stop or done == config.steps or done % config.checkpoint_every == 0:
            checkpoints.save(done, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        if stop and done < config.steps:
            raise Interrupted(f"Stopped after step {step} of {config.steps}, checkpoint saved: start again to go on.")
    return model


def _refuse_non_finite(step: int, rows: Tensor, checkpoints: Checkpoints, **values: float) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise NonFinite(
                f"Step {step}: {name} is {value} on pool rows {rows.tolist()}; "
                f"last good checkpoint: {checkpoints.describe_latest()}."
            )


def evaluate_sft(config: SFTConfig, model: GPTModel) -> dict[str, float]:
    """`evaluate_policy` on the held-out problems of the config."""
    problems = config.task.problems("eval", config.eval_problems, seed=0)
    return evaluate_policy(model, config.task, problems, n=config.eval_samples, seed=0)


def build_sft_policy(config: SFTConfig, directory: Path) -> None:
    """`Artifact.build`: train inside `directory` (interrupted training goes on there) and leave the policy.

    weights.safetensors (`load_weights`, names of `GPTModel.state_dict`), config.json, eval.json (pass@1, pass@n,
    entropy on held-out problems, parameters), and the training record in run/.
    """
    with RunDirectory.open(directory / "run", config, config.seed, study="sft") as run:
        if run.completed is not None:
            return
        model = train_sft(config, run)
        save_weights(directory / "weights.safetensors", model.state_dict())
        result: dict[str, Any] = {**evaluate_sft(config, model), "parameters": parameter_count(model)}
        write_json(directory / "config.json", plain(config))
        write_json(directory / "eval.json", result)
        run.finish(result)
