"""The record of one run: a folder that can be trusted, resumed and compared byte by byte.

    runs/<paper>/<scale>/<study>/<arm>/seed<k>/
        config.json       the whole config and its hash
        metrics.jsonl     deterministic values, one row per step, flushed row by row
        timing.jsonl      clocks, tokens per second, memory
        provenance.json   commit, code, artifacts, packages, device
        cost.json         CPU-seconds, wall seconds and peak memory, added up over resumes
        summary.json      written last: what `run` returned, and checksums of the deterministic files

Inside the pool the launcher opens it; on its own:

    with RunDirectory.open("runs/try", config, seed=0) as run:
        run.finish(train(run))
"""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TextIO

from shared.experiment import provenance as provenance_of
from shared.experiment.contracts import AssayError, NonFinite
from shared.experiment.files import (
    FileLock,
    RunBusy,
    Unwritable,
    config_hash,
    digest,
    ensure_writable,
    move_aside,
    plain,
    remove_leftovers,
    sha256_file,
    write_atomic,
    write_json,
    writing,
)
from shared.experiment.signals import StopSignals, stop_requested

CHECKED = ("metrics.jsonl", "config.json", "provenance.json")
REPORT_EVERY_S = 0.2

_log = logging.getLogger(__name__)
_reporter: Callable[[int, int], None] | None = None


class RecordDamaged(AssayError):
    """A file of a record was cut short or edited."""


@dataclass(frozen=True)
class Status:
    """State of a record on disk. `detail` names the damaged file, or says what differs in a stale one."""

    kind: Literal["missing", "complete", "incomplete", "stale", "damaged"]
    detail: str = ""


def set_reporter(reporter: Callable[[int, int], None] | None) -> None:
    """Where `progress` of every run in this process goes; the launcher's workers use it."""
    global _reporter
    _reporter = reporter


def report(done: int, total: int) -> None:
    """Pass on how far the run of this process is."""
    if _reporter is not None:
        _reporter(done, total)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordDamaged(f"{path} cannot be read ({error}).") from error
    if not isinstance(value, dict):
        raise RecordDamaged(f"{path} holds no JSON object.")
    return value


def _read_lines(path: Path) -> list[str]:
    """Whole lines of a JSONL file; a last line without its newline is what a killed process left, and is dropped."""
    if not path.exists():
        return []
    return [
        line.decode(errors="replace") for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")
    ]


def _readable_lines(path: Path) -> list[str]:
    """Lines before the first that is no row: a power cut may leave a block of zeros between written ones."""
    lines = _read_lines(path)
    for number, line in enumerate(lines):
        try:
            json.loads(line)["step"]
        except (ValueError, TypeError, KeyError):
            _log.warning("%s: line %d is no row; it and what follows is dropped.", path, number + 1)
            return lines[:number]
    return lines


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl or timing.jsonl. Raises `RecordDamaged`."""
    try:
        return [json.loads(line) for line in _read_lines(path)]
    except ValueError as error:
        raise RecordDamaged(f"{path} cannot be read ({error}).") from error


def read_summary(path: Path) -> dict[str, Any]:
    """summary.json of a complete record, after its checksums were verified. Raises `RecordDamaged`."""
    path = Path(path)
    record = _read_json(path / "summary.json")
    sums = record.get("sha256")
    if not isinstance(sums, dict) or sums.get("summary") != digest(record.get("summary")):
        raise RecordDamaged(f"{path / 'summary.json'} does not match its checksum.")
    for name in CHECKED:
        if not (path / name).exists() or sha256_file(path / name) != sums.get(name):
            raise RecordDamaged(f"{path / name} does not match its checksum.")
    return record


def status(path: Path, wanted_config: str, wanted_code: str) -> Status:
    """Compare the record in folder `path` with the config and code hash that a run would have now."""
    path = Path(path)
    if not any((path / name).exists() for name in ("config.json", "metrics.jsonl", "summary.json")):
        return Status("missing")
    try:
        complete = (path / "summary.json").exists()
        if complete:
            read_summary(path)
        found_config = _read_json(path / "config.json").get("config_hash")
        found_code = _read_json(path / "provenance.json").get("code_hash")
    except RecordDamaged as damage:
        return Status("damaged", str(damage))
    if found_config != wanted_config:
        return Status("stale", "the config changed")
    if found_code != wanted_code:
        return Status("stale", "the code changed")
    return Status("complete" if complete else "incomplete")


class RunDirectory:
    """A record being written; implements `RunContext`. One process at a time, see `open`."""

    def __init__(self, path: Path, config: Any, seed: int, arm: str, study: str, scale: str) -> None:
        self.dir = Path(path)
        self.config = config
        self.seed = seed
        self.arm = arm
        self.study = study
        self.scale = scale
        self.completed: dict[str, Any] | None = None
        self._artifacts: Mapping[str, Path] = {}
        self._lock = lock_of(self.dir)
        self._signals = StopSignals()
        self._metrics: Any = None
        self._timing: Any = None
        self._last_step: int | None = None
        self._logged = False
        self._reported = 0.0
        self._earlier_cost: dict[str, float] = {}
        self._started = (0.0, 0.0)

    @classmethod
    def open(
        cls,
        path: Path | str,
        config: Any,
        seed: int,
        arm: str = "main",
        study: str = "main",
        scale: str = "proxy",
        *,
        artifacts: Mapping[str, Path] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> RunDirectory:
        """Lock the folder and make it ready to run, resume or be read.

        A record of the same config and code is kept: `completed` holds its summary if it is whole, otherwise its rows
        stay for `rewind`. Stale and damaged records are moved aside as `<path>.stale-N`, `<path>.damaged-N`.
        `provenance` defaults to what `shared.experiment.provenance.collect` finds; its `code_hash` decides staleness.
        Raises `RunBusy` if another process holds the folder, `Unwritable` if it cannot be written.
        """
        run = cls(Path(path), config, seed, arm, study, scale)
        ensure_writable(run.dir.parent)
        if not run._lock.acquire():
            raise RunBusy(
                f"{run.dir} is being run by process {run._lock.holder()}: wait for it, or use another folder."
            )
        try:
            run._artifacts = artifacts or {}
            with writing(run.dir):
                run._prepare(dict(provenance) if provenance is not None else provenance_of.collect())
        except BaseException:
            run.close()
            raise
        return run

    def _prepare(self, provenance: dict[str, Any]) -> None:
        found = status(self.dir, config_hash(self.config), provenance.get("code_hash", ""))
        if found.kind == "complete":
            self.completed = read_summary(self.dir)["summary"]
            # A kill right after the summary leaves them.
            shutil.rmtree(self.dir / "checkpoints", ignore_errors=True)
            return
        if found.kind in ("stale", "damaged"):
            move_aside(self.dir, found.kind)
        ensure_writable(self.dir)
        remove_leftovers(self.dir)
        head = {"study": self.study, "arm": self.arm, "seed": self.seed, "scale": self.scale}
        body = {"config": plain(self.config), "config_hash": config_hash(self.config)}
        provenance["device"] = provenance_of.device_name()
        if found.kind == "incomplete":
            provenance_of.go_on_from(_read_json(self.dir / "provenance.json"), provenance)
        write_json(self.dir / "provenance.json", provenance)
        write_json(self.dir / "config.json", {**head, **body})
        if (self.dir / "cost.json").exists():
            try:
                self._earlier_cost = _read_json(self.dir / "cost.json")
            except RecordDamaged as damage:
                _log.warning("%s The cost of earlier attempts is lost.", damage)
        self._signals.install()
        self._started = (_cpu_seconds(), time.monotonic())
        self._rewrite_metrics(_readable_lines(self.dir / "metrics.jsonl"))
        write_atomic(self.dir / "timing.jsonl", "".join(_readable_lines(self.dir / "timing.jsonl")))
        self._timing = open(self.dir / "timing.jsonl", "a", encoding="utf-8")  # noqa: SIM115

    def _rewrite_metrics(self, lines: list[str]) -> None:
        if self._metrics is not None:
            self._metrics.close()
        path = self.dir / "metrics.jsonl"
        write_atomic(path, "".join(lines))
        self._last_step = json.loads(lines[-1])["step"] if lines else None
        self._metrics = open(path, "a", encoding="utf-8")  # noqa: SIM115

    @property
    def checkpoints(self) -> Path:
        """Folder for checkpoints; it goes when the run is complete."""
        folder = self.dir / "checkpoints"
        with writing(folder):
            folder.mkdir(exist_ok=True)
        return folder

    def artifact(self, name: str) -> Path:
        """Directory of a built artifact that the study declared."""
        if name not in self._artifacts:
            known = ", ".join(self._artifacts) or "none"
            raise AssayError(
                f"Study {self.study!r} declares no artifact {name!r} (it has: {known}): add it to Study.artifacts."
            )
        return self._artifacts[name]

    def log(self, step: int, **metrics: float) -> None:
        """Append one row. Steps grow; the first row after a restart drops what an earlier attempt left behind it.

        Raises `NonFinite` for NaN and Inf: earlier rows and checkpoints stay.
        """
        if self.completed is not None:
            raise AssayError(f"{self.dir} is complete: `RunDirectory.completed` holds its summary.")
        row: dict[str, Any] = {"step": int(step)}
        for name, value in metrics.items():
            row[name] = int(value) if isinstance(value, int) else float(value)
            if not math.isfinite(row[name]):
                raise NonFinite(f"Step {step}: {name} is {row[name]}. Earlier rows and checkpoints stay in {self.dir}.")
        if self._last_step is not None and step <= self._last_step:
            if self._logged:
                raise AssayError(f"Step {step} was logged after step {self._last_step}: steps must grow.")
            self.rewind(step - 1)
        _append(self._metrics, row)
        self._last_step = int(step)
        self._logged = True

    def time(self, step: int, **clocks: float) -> None:
        """Append one row to timing.jsonl, which no comparison reads."""
        row = {"step": int(step), **{name: float(value) for name, value in clocks.items()}}
        _append(self._timing, row)

    def rewind(self, step: int) -> None:
        """Drop rows with a step above `step`."""
        lines = _read_lines(self.dir / "metrics.jsonl")
        self._rewrite_metrics([line for line in lines if json.loads(line)["step"] <= step])

    def rows(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl so far."""
        return read_rows(self.dir / "metrics.jsonl")

    def progress(self, done: int, total: int) -> None:
        """Tell the launcher how far this run is; cheap enough to call at each step."""
        now = time.monotonic()
        if now - self._reported >= REPORT_EVERY_S or done >= total:
            self._reported = now
            report(done, total)

    def stop_requested(self) -> bool:
        """True once SIGTERM or Ctrl-C arrived: save a checkpoint, then raise `Interrupted`."""
        return stop_requested()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Close the record as complete. `summary` is plain JSON; `None` stands for undefined, NaN and Inf raise."""
        values = plain(dict(summary), "summary")
        _refuse_non_finite(summary, "summary")
        # The summary holds their checksum, so a power cut must not take the rows and leave the summary.
        with writing(self.dir / "metrics.jsonl"):
            os.fsync(self._metrics.fileno())
        self._write_cost()
        sums = {name: sha256_file(self.dir / name) for name in CHECKED}
        sums["summary"] = digest(values)
        steps = len(_read_lines(self.dir / "metrics.jsonl"))
        write_json(self.dir / "summary.json", {"summary": values, "steps": steps, "sha256": sums})
        self.completed = values
        shutil.rmtree(self.dir / "checkpoints", ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Give lock and signals back. An unfinished record stays resumable, its cost so far is kept."""
        try:
            for file in (self._timing, self._metrics):
                if file is not None:
                    # What a full disk refused was reported when it was written.
                    with suppress(OSError):
                        file.close()
            if self._timing is not None and self.completed is None:
                self._write_cost()
        except Unwritable as error:
            _log.warning("The cost of this attempt is lost: %s", error)
        finally:
            self._timing = self._metrics = None
            self._signals.remove()
            self._lock.release()

    def _write_cost(self) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak_mb = peak / (1 << 20) if sys.platform == "darwin" else peak / (1 << 10)
        cost = {
            "cpu_s": _cpu_seconds() - self._started[0] + self._earlier_cost.get("cpu_s", 0.0),
            "wall_s": time.monotonic() - self._started[1] + self._earlier_cost.get("wall_s", 0.0),
            "max_rss_mb": max(peak_mb, self._earlier_cost.get("max_rss_mb", 0.0)),
            "attempts": int(self._earlier_cost.get("attempts", 0)) + 1,
        }
        write_json(self.dir / "cost.json", {k: v if k == "attempts" else round(v, 3) for k, v in cost.items()})

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def lock_of(path: Path) -> FileLock:
    """The lock of a record lies beside its folder, which may be moved aside; links to a folder share its lock."""
    path = path.resolve()
    return FileLock(path.with_name(f".{path.name}.lock"))


def _append(file: TextIO, row: Mapping[str, Any]) -> None:
    with writing(Path(file.name)):
        file.write(json.dumps(row) + "\n")
        file.flush()


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _refuse_non_finite(value: Any, where: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise NonFinite(f"{where} is {value}: return None for a value that is undefined.")
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_non_finite(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _refuse_non_finite(item, f"{where}[{i}]")
