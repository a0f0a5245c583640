"""The checks: what each runs, what it is compared with, and how close it must come. Runs them one after the other.

record = run_checks("cuda", GPU)       # what results/gpu-check/<gpu>.json holds
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

from shared.experiment import provenance
from shared.gpucheck import subjects
from shared.gpucheck.processes import Device, RankFailed, on_ranks
from shared.gpucheck.sizes import Sizes
from shared.megatron.layout import Layout

Subject = Callable[..., Any]
"""Takes sizes and a folder, returns `subjects.Series`."""


ONE_PROCESS = Layout()


@dataclass(frozen=True)
class Machine:
    """What the checks choose by. memory_gib: of the smallest GPU."""

    device: str
    gpus: int
    memory_gib: float
    cuda: str | None
    transformer_engine: bool


@dataclass(frozen=True)
class Check:
    """`subject(sizes, folder)` on the device, under `layout`.

    tolerances: series -> largest difference from `reference`, run in one process on the CPU in float32, as a share of
        the reference's largest value; 0 asks for equal numbers.
    limits: series -> largest value.
    skip: why this machine cannot run it, else "".
    """

    name: str
    what: str
    subject: Subject
    reference: Subject | None = None
    tolerances: Mapping[str, float] = field(default_factory=dict)
    limits: Mapping[str, float] = field(default_factory=dict)
    layout: Layout = ONE_PROCESS
    skip: Callable[[Machine, Sizes], str] = lambda machine, sizes: ""


def _two_gpus(machine: Machine, sizes: Sizes) -> str:
    return "" if machine.gpus >= 2 else f"needs 2 GPUs, this machine has {machine.gpus}"


def _engine(machine: Machine, sizes: Sizes) -> str:
    return "" if machine.transformer_engine else "Transformer Engine is not installed"


def _memory(which: str, machine: Machine, sizes: Sizes) -> str:
    needed = getattr(sizes, which).needs_gib
    return "" if machine.memory_gib >= needed else f"needs {needed:g} GiB, the GPU has {machine.memory_gib:.1f}"


FP32 = {"loss": 1e-5, "grad_norm": 1e-4}
PRETRAIN = {**FP32, "eval_loss": 1e-5}
BF16 = {"loss": 5e-3, "eval_loss": 5e-3}
_fp32, _bf16 = subjects.pretraining, partial(subjects.pretraining, precision="bf16")
_replay, _sample, _greedy = subjects.stored_rollouts, subjects.sampled_rollouts, subjects.greedy
_tp2, _dp2 = Layout(tp=2, sequence_parallel=True), Layout(dp=2, distributed_optimizer=True, overlap=True)

CHECKS = (
    Check("warm-start", "train_sft in float32, stopped and resumed", subjects.warm_start, subjects.warm_start, FP32),
    Check("pretrain", "pretrain (ParallelModel) in float32, stopped and resumed", _fp32, _fp32, PRETRAIN),
    Check("pretrain-bf16", "the same in bfloat16", _bf16, _fp32, BF16),
    Check("learner", "RL updates on stored rollouts", _replay, _replay, {"entropy": 1e-5, "grad_norm": 1e-4}),
    Check("rl-trainer", "train_rl with sampling", _sample, _sample, {"entropy": 2e-2}, {"gap_max": 1e-4}),
    Check("greedy", "greedy tokens of the native engine", _greedy, _greedy, {"tokens": 0.0, "logprobs": 1e-4}),
    Check("tp2", "pretrain on two GPUs, TP2+SP", _fp32, _fp32, PRETRAIN, layout=_tp2, skip=_two_gpus),
    Check("dp2", "pretrain on two GPUs, DP2+distopt+overlap", _fp32, _fp32, PRETRAIN, layout=_dp2, skip=_two_gpus),
    Check(
        "transformer-engine",
        "pretraining steps in bfloat16 with Transformer Engine's layers",
        subjects.transformer_engine,
        _fp32,
        {"loss": BF16["loss"]},
        skip=_engine,
    ),
    Check("speed", "bfloat16 training steps", subjects.speed, skip=partial(_memory, "base")),
    Check("speed-large", "larger ones", partial(subjects.speed, which="large"), skip=partial(_memory, "large")),
)


def run_checks(
    device: Device, sizes: Sizes, say: Callable[[str], None] = print, checks: Sequence[Check] = CHECKS
) -> dict[str, Any]:
    """The record of all checks: what machine, and per check name, what, status, detail, numbers, wall_s.

    status is pass, fail or skipped. numbers holds the differences, or for a check without a reference what it
    measured. A check that fails or dies is told and does not keep the others from running.
    """
    (machine,) = on_ranks(_machine, device, ONE_PROCESS)
    references = _References(device, sizes)
    entries = []
    for check in checks:
        start = time.monotonic()
        status, detail, numbers = _outcome(check, device, sizes, machine, references)
        seconds = round(time.monotonic() - start, 1)
        measured = "" if detail else ", ".join(f"{name} {_short(value)}" for name, value in numbers.items())
        say(f"{status:<7} {check.name}: {detail or measured} ({seconds} s)")
        entries.append(
            {
                "name": check.name,
                "what": check.what,
                "status": status,
                "detail": detail,
                "numbers": numbers,
                "limits": {**check.tolerances, **check.limits},
                "wall_s": seconds,
            }
        )
    found = provenance.collect()
    where = {name: found[name] for name in ("commit", "dirty", "packages", "python", "platform")}
    return {
        "device": machine.device,
        "gpus": machine.gpus,
        "memory_gib": machine.memory_gib,
        "cuda": machine.cuda,
        "driver": _driver() if device == "cuda" else None,
        **where,
        "checks": entries,
    }


class _References:
    """One process on the CPU, each subject once."""

    def __init__(self, device: Device, sizes: Sizes) -> None:
        self.device, self.sizes = device, sizes
        self._known: dict[Subject, subjects.Series] = {}

    def of(self, subject: Subject) -> subjects.Series:
        if subject not in self._known:
            (found,) = on_ranks(subject, "cpu", ONE_PROCESS, self.sizes, spawn=self.device == "cuda")
            self._known[subject] = found
        return self._known[subject]


def _outcome(
    check: Check, device: Device, sizes: Sizes, machine: Machine, references: _References
) -> tuple[str, str, dict[str, Any]]:
    if reason := check.skip(machine, sizes):
        return "skipped", reason, {}
    try:
        answers = on_ranks(check.subject, device, check.layout, sizes)
        if check.reference is None:
            return "pass", "", answers[0]
        numbers = differences(check, answers, references.of(check.reference))
    except RankFailed as error:
        print(error.trace, file=sys.stderr, end="")
        return "fail", _without_paths(str(error)), {}
    limits = {**check.tolerances, **check.limits}
    # A NaN is above every limit.
    above = [f"{name} {value:.1e} > {limits[name]:g}" for name, value in numbers.items() if not value <= limits[name]]
    return ("fail" if above else "pass"), ", ".join(above), {name: _finite(value) for name, value in numbers.items()}


def differences(check: Check, answers: Sequence[subjects.Series], reference: subjects.Series) -> dict[str, float]:
    """Series -> its largest difference on any rank, relative to the reference's largest value; or its largest value."""
    found = {}
    for name in check.tolerances:
        wanted = reference[name]
        scale = max(abs(value) for value in wanted)
        gaps = [math.inf if len(answer[name]) != len(wanted) else 0.0 for answer in answers]
        gaps += [abs(a - b) / scale for answer in answers for a, b in zip(answer[name], wanted, strict=False)]
        found[name] = _largest(gaps)
    for name in check.limits:
        found[name] = _largest([value for answer in answers for value in answer[name]])
    return found


def _largest(values: list[float]) -> float:
    return math.nan if any(math.isnan(value) for value in values) else max(values)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _short(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"


def _machine(folder: str) -> Machine:
    import torch

    del folder
    if not torch.cuda.is_available():
        return Machine("cpu", 2, 0.0, None, find_spec("transformer_engine") is not None)
    every = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    memory = min(gpu.total_memory for gpu in every) / 2**30
    engine = find_spec("transformer_engine") is not None
    return Machine(every[0].name, len(every), round(memory, 1), torch.version.cuda, engine)


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _without_paths(text: str) -> str:
    """A sentence that may be committed: folders of this machine left out, at most 300 characters."""
    return re.sub(r"(?<![\w.])(?:/[\w.@+-]+)+/", "", text)[:300]
