"""A noisy quadratic that checkpoints, resumes, sleeps and fails on demand."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.experiment.contracts import Interrupted, RunContext


@dataclass(frozen=True)
class Noise:
    scale: float = 0.1


@dataclass(frozen=True)
class Quadratic:
    steps: int = 20
    lr: float = 0.1
    noise: Noise = Noise()
    sleep: float = 0.0
    mode: str = "plain"
    """plain | fail | die (SIGKILL itself once, half-way) | term (SIGTERM itself once)"""


@dataclass(frozen=True)
class Start:
    x: float = 5.0
    sleep: float = 0.0


def build_start(config: Start, directory: Path) -> None:
    with open(directory / "attempts", "a") as file:
        file.write("x")
    time.sleep(config.sleep)
    (directory / "start.json").write_text(json.dumps(config.x))


def descend(run: RunContext) -> dict[str, Any]:
    """Minimise x^2; the noise is a function of seed and step."""
    config: Quadratic = run.config
    state = run.checkpoints / "state.json"
    x, done = json.loads(state.read_text()) if state.exists() else (_start(run), 0)
    run.rewind(done)
    for step in range(done + 1, config.steps + 1):
        noise = random.Random(1000 * run.seed + step).gauss(0, config.noise.scale)
        x -= config.lr * (2 * x + noise)
        run.log(step, x=x, loss=x * x)
        run.progress(step, config.steps)
        time.sleep(config.sleep)
        if config.mode == "fail" and step == 3:
            raise ValueError("the toy was told to fail")
        if config.mode == "die" and step == config.steps // 2 and not (run.dir / "died").exists():
            (run.dir / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if config.mode == "term" and step == 2 and done == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        stop = run.stop_requested()
        if stop or step % 4 == 0:
            state.with_suffix(".new").write_text(json.dumps([x, step]))
            state.with_suffix(".new").rename(state)
        if stop and step < config.steps:
            raise Interrupted(f"stopped after step {step}")
    return {"x": x, "loss": x * x}


def _start(run: RunContext) -> float:
    return json.loads((run.artifact("start") / "start.json").read_text()) if run.study == "warm" else 5.0
