"""The RL loop: rollout, rewards, updates, metrics, evaluation, checkpoint; resumable at every checkpoint.

summary = train_rl(run)          # run.config is an RLConfig, run.artifact(config.policy) holds the warm start

Under a layout of several ranks (tp, sequence_parallel, dp), every rank calls it and all get the rows of one process.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from shared.engines.contracts import Engine
from shared.engines.native import NativeEngine
from shared.experiment.contracts import Interrupted, NonFinite, RunContext
from shared.megatron.init import current_layout
from shared.megatron.model import build_model, untie
from shared.rl.config import RLConfig
from shared.rl.evaluate import evaluate_policy
from shared.rl.learner import Learner
from shared.rl.ranks import SharedEngine, check_layout
from shared.rl.rollout import Collector
from shared.rl.saves import saves_of
from shared.rl.summary import summarise
from shared.rl.update import ParallelUpdate
from shared.training.checkpoint import load_weights


def warm_policy(config: RLConfig, run: RunContext):
    """GPTModel with the artifact's weights; its own output head where the config asks for one."""
    model = build_model(config.model, seed=0)
    model.load_state_dict(load_weights(run.artifact(config.policy) / "weights.safetensors"))
    return untie(model) if config.untie_head else model


def policy_learner(config: RLConfig, run: RunContext) -> Learner:
    """The warm-started policy with its optimiser, whole or as this rank's part of it."""
    if current_layout().world_size == 1:
        return Learner(config, warm_policy(config, run))
    from shared.megatron.shards import load_whole

    whole = load_weights(run.artifact(config.policy) / "weights.safetensors")
    if config.untie_head:
        whole["output_layer.weight"] = whole["embedding.word_embeddings.weight"]
    tied = config.model.tie_embeddings and not config.untie_head
    update = ParallelUpdate(config.optimizer, replace(config.model, tie_embeddings=tied))
    model = update.parallel.chunks[0]
    load_whole(model, whole)
    update.parallel.weights_changed()
    return Learner(config, model, update)


def train_rl(run: RunContext) -> dict[str, Any]:
    """Train one arm with one seed. Logs one row per rollout; the row's entropy and reward are before its updates.

    Raises:
        Interrupted: a stop was requested; a checkpoint of the last finished rollout is saved.
        NonFinite: a loss, gradient or metric is not finite; names rollout, mini-batch and the last good checkpoint.
        ImpossibleLayout: before anything is built.
    """
    config: RLConfig = run.config
    check_layout()
    saves = saves_of(run)
    learner = policy_learner(config, run)
    engine: Engine = NativeEngine(learner.model, config.task.eos_id, config.task.pad_id)
    if learner.rows.size > 1:
        engine = SharedEngine(engine, learner.rows, config.task.pad_id)
    collector = Collector(config, engine, run.seed)
    first = saves.resume(learner)
    for rollout in range(first, config.rollouts):
        started = time.perf_counter(), time.process_time()
        try:
            row = train_rollout(config, learner, collector, run.seed, rollout)
            run.log(rollout, **row)
        except NonFinite as error:
            raise NonFinite(f"{error}; last good checkpoint: {saves.describe_latest()}") from None
        run.time(rollout, wall_s=time.perf_counter() - started[0], cpu_s=time.process_time() - started[1])
        run.progress(rollout + 1, config.rollouts)
        stop = run.stop_requested()
        if stop or (rollout + 1) % config.checkpoint_every == 0:
            saves.save(rollout + 1, learner)
        if stop and rollout + 1 < config.rollouts:
            raise Interrupted(f"stopped after rollout {rollout}, checkpoint saved")
    return summarise(run.rows(), config)


def train_rollout(
    config: RLConfig, learner: Learner, collector: Collector, seed: int, rollout: int
) -> dict[str, float]:
    """One rollout with its updates, and the evaluation where one is due."""
    row: dict[str, float] = {}
    if rollout % config.eval_every == 0:
        row |= {f"eval_{k}": v for k, v in evaluation(config, learner.model).items()}
    batch, metrics = collector.collect(rollout)
    row |= metrics
    if batch is not None:
        row |= learner.update(batch, seed=seed, rollout=rollout)
    if rollout == config.rollouts - 1:
        row |= {f"final_{k}": v for k, v in evaluation(config, learner.model).items()}
    return row


def evaluation(config: RLConfig, model) -> dict[str, float]:
    """pass@1, pass@n, entropy, lengths on the held-out problems; the same problems and uniforms for every arm."""
    problems = config.task.problems("eval", config.eval_problems, seed=0)
    return evaluate_policy(model, config.task, problems, n=config.eval_samples, seed=0, temperature=config.temperature)
