"""What the checks run, on this process's device: the project's own training, RL and decoding, at given sizes.

Every function takes `Sizes` and a folder that all ranks share, and returns named series of numbers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from shared.data.markov import MarkovText
from shared.data.tasks.countdown import StyledCountdown
from shared.dryrun.count import Counts
from shared.dryrun.work import forward_flops
from shared.engines.contracts import Sampling
from shared.engines.native import NativeEngine
from shared.experiment.contracts import Interrupted, NonFinite
from shared.gpucheck.peaks import peak_tflops
from shared.gpucheck.sizes import Sizes
from shared.megatron.init import current_layout
from shared.megatron.model import build_chunks, build_model, parameter_count
from shared.megatron.optimizer import AdamWConfig
from shared.megatron.parallel import Microbatch, ParallelModel
from shared.rl.config import OptimizerConfig, RLConfig
from shared.rl.losses import PPOClip
from shared.rl.replay import replay
from shared.rl.trainer import train_rl
from shared.training.checkpoint import save_weights
from shared.training.pretrain import PretrainConfig, learning_rate, microbatches, own_rows, pretrain
from shared.training.sft import SFTConfig, train_sft

Series = dict[str, list[float]]
SEED = 3
GREEDY_SEED = 31
"""Of 40 seeds the one whose closest choice between two tokens is the clearest."""


class Rows:
    """`RunContext` in memory, one on each rank; asks to stop once it has `stop_after` rows."""

    arm, study, scale = "check", "gpu-check", "gpu"

    def __init__(self, config: Any, folder: str, stop_after: int | None = None) -> None:
        self.config, self.seed, self.dir, self.stop_after = config, SEED, Path(folder), stop_after
        self._rows: list[dict[str, float]] = []

    def artifact(self, name: str) -> Path:
        return self.dir / name

    def log(self, step: int, **metrics: float) -> None:
        self._rows.append({"step": float(step), **metrics})

    def time(self, step: int, **clocks: float) -> None:
        pass

    def rewind(self, step: int) -> None:
        self._rows = [row for row in self._rows if row["step"] <= step]

    def rows(self) -> list[dict[str, float]]:
        return self._rows

    def progress(self, done: int, total: int) -> None:
        pass

    def stop_requested(self) -> bool:
        return len(self._rows) == self.stop_after

    @property
    def checkpoints(self) -> Path:
        path = self.dir / "checkpoints"
        path.mkdir(exist_ok=True)
        return path

    def series(self, *names: str) -> Series:
        """The columns of these names."""
        return {name: [row[name] for row in self._rows] for name in names}


def warm_start(sizes: Sizes, folder: str) -> Series:
    """`train_sft` on Countdown, stopped half-way and resumed from its checkpoint."""
    config = SFTConfig(_task_model(sizes), StyledCountdown(), steps=sizes.steps, pool=256, batch_size=4 * sizes.rows)
    config = replace(config, warmup_steps=sizes.steps // 4, lr=1e-3)
    return _stopped_and_resumed(Rows(config, folder, sizes.steps // 2), lambda run: train_sft(config, run))


def pretraining(sizes: Sizes, folder: str, precision: Literal["fp32", "bf16"] = "fp32") -> Series:
    """`pretrain` on generated text, stopped half-way and resumed from its checkpoint; then its held-out loss."""
    config = _pretrain_config(sizes, precision)
    run, found = Rows(config, folder, sizes.steps // 2), {}
    series = _stopped_and_resumed(run, lambda run: found.update(pretrain(config, run, _text(sizes))))
    return {**series, "eval_loss": [found["eval_loss"]]}


def _stopped_and_resumed(run: Rows, train: Callable[[Rows], Any]) -> Series:
    with suppress(Interrupted):
        train(run)
    assert len(run.rows()) == run.stop_after, "the run did not stop when it was asked to"
    run.stop_after = None
    train(run)
    return run.series("loss", "grad_norm")


def transformer_engine(sizes: Sizes, folder: str) -> Series:
    """The steps of `pretraining` in bfloat16 with Transformer Engine's layers, from the same weights."""
    del folder
    config = _pretrain_config(sizes, "bf16")
    model = ParallelModel(config.model, config.optimizer(), seed=None, precision="bf16", backend="te")
    local = build_chunks(config.model, config.seed, model.device, dtype=torch.bfloat16)[0]
    weights = dict(model.chunks[0].named_parameters())
    with torch.no_grad():
        for name, weight in local.named_parameters():
            weights[engine_name(name)].copy_(weight)
    model.weights_changed()
    losses = []
    for step in range(config.steps):
        rows = own_rows(config, current_layout())
        sequences = _text(sizes).training(config.seed, step, rows, config.sequence_length + 1)
        losses.append(model.train_step(microbatches(config, sequences), learning_rate(config, step)).loss)
    return {"loss": losses}


def engine_name(name: str) -> str:
    """Transformer Engine's name of a parameter: it keeps a norm in the product that follows."""
    name = name.replace(".input_layernorm.", ".self_attention.linear_qkv.layer_norm_")
    return name.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")


def stored_rollouts(sizes: Sizes, folder: str) -> Series:
    """The learner on two stored rollouts, as the canaries of the RL papers run it."""
    run = Rows(_rl_config(sizes), folder)
    replay(run)
    return run.series("entropy", "grad_norm")


def sampled_rollouts(sizes: Sizes, folder: str) -> Series:
    """`train_rl` for two rollouts, evaluations included, from random weights.

    gap_max: largest difference, in nats, between the engine's log-probability of a token and the trainer's.
    """
    config = _rl_config(sizes)
    (Path(folder) / config.policy).mkdir()
    save_weights(Path(folder) / config.policy / "weights.safetensors", build_model(config.model, SEED).state_dict())
    run = Rows(config, folder)
    train_rl(run)
    return run.series("entropy", "gap_max")


def greedy(sizes: Sizes, folder: str) -> Series:
    """Greedy tokens of the native engine after prompts of different lengths, and their log-probabilities."""
    del folder
    # Wide weights: a fresh model's logits are so close together that rounding would choose between tokens.
    config = replace(sizes.model, init_std=0.1)
    engine = NativeEngine(build_model(config, GREEDY_SEED), eos_id=-1, pad_id=0)
    rollouts = engine.generate(prompts(), Sampling(max_new_tokens=sizes.new_tokens, greedy=True), n=1, seed=0)
    tokens, logprobs = rollouts.tokens_NT.flatten().tolist(), rollouts.logprobs_NT.flatten().tolist()
    return {"tokens": tokens, "logprobs": logprobs}


def prompts() -> list[list[int]]:
    """Eight of them, two to nine tokens long."""
    return [[1 + (7 * row + place) % 60 for place in range(2 + row)] for row in range(8)]


def speed(sizes: Sizes, folder: str, which: Literal["base", "large"] = "base") -> dict[str, float | None]:
    """Seconds, tokens per second, MFU and peak memory of bfloat16 training steps in this process.

    MFU: model FLOPs (docs/dryrun.md; three forward passes a step) per second over the GPU's peak; None without one.
    """
    del folder
    size = sizes.base if which == "base" else sizes.large
    model = ParallelModel(size.model, AdamWConfig(lr=1e-4), seed=0, precision="bf16")
    text_RT = torch.randint(size.model.vocab_size, (size.rows, size.length + 1), device=model.device)
    parts = text_RT.split(size.micro_rows)
    batches = [Microbatch(part[:, :-1], part[:, 1:], torch.ones_like(part[:, 1:])) for part in parts]
    for _ in range(3):
        loss = model.train_step(batches, 1e-4).loss
    _wait()
    start = time.perf_counter()
    for _ in range(size.steps):
        loss = model.train_step(batches, 1e-4).loss
    _wait()
    seconds = (time.perf_counter() - start) / size.steps
    if not math.isfinite(loss):
        raise NonFinite(f"the loss became {loss}")
    flops = 3 * size.rows * forward_flops(size.model, counts(model.chunks[0]), size.length)
    gpu = model.device.type == "cuda"
    peak = peak_tflops(torch.cuda.get_device_name()) if gpu else None
    return {
        "parameters": parameter_count(model.chunks[0]),
        "step_s": seconds,
        "tokens_per_s": size.rows * size.length / seconds,
        "model_tflops": flops / seconds / 1e12,
        "mfu": flops / seconds / 1e12 / peak if peak else None,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if gpu else None,
    }


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def counts(model: Any) -> Counts:
    """As `shared.dryrun.count` counts a dense model with tied embeddings, from the one that is there."""
    sizes = [(p.numel(), p.dim()) for p in model.parameters()]
    total, matrices = sum(n for n, _ in sizes), sum(n for n, dimensions in sizes if dimensions > 1)
    return Counts(total=total, active=total, multiplied=matrices, stages=())


def _text(sizes: Sizes) -> MarkovText:
    return MarkovText(vocab_size=sizes.model.vocab_size)


def _pretrain_config(sizes: Sizes, precision: Literal["fp32", "bf16"]) -> PretrainConfig:
    return PretrainConfig(
        sizes.model,
        sequence_length=sizes.length,
        global_batch_size=sizes.rows,
        micro_batch_size=sizes.micro_rows,
        steps=sizes.steps,
        lr=1e-3,
        warmup_steps=sizes.steps // 4,
        precision=precision,
        seed=SEED,
    )


def _task_model(sizes: Sizes) -> Any:
    task = StyledCountdown()
    return replace(sizes.model, vocab_size=task.vocab_size, max_sequence_length=40)


def _rl_config(sizes: Sizes) -> RLConfig:
    return RLConfig(
        loss=PPOClip(0.2, 0.2, 10.0),
        task=StyledCountdown(),
        model=_task_model(sizes),
        policy="policy",
        optimizer=OptimizerConfig(body_lr=3e-4, warmup_rollouts=0),
        prompts=8,
        gen_prompts=8,
        # Random weights solve nothing: every group would be dropped.
        dynamic_sampling="off",
        pool=64,
        rollouts=2,
        minibatches=4,
        eval_every=2,
        eval_problems=4,
    )
