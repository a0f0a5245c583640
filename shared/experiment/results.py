"""One reader for records: those committed under `results/` and those fresh under `runs/`.

Special: both layouts answer the same questions, an arm is read when it is asked for, and every file is checked
against its checksum before a number leaves it.

    results = Results.committed("cegppo", "proxy")
    results.summaries("full_T")["grpo"][0]["entropy"]

    results/<paper>/<scale>/<study>/<arm>/   arm.json, runs.jsonl.gz, curves.jsonl.gz     written by promote
    runs/<paper>/<scale>/<study>/<arm>/seed<k>/   config, metrics, provenance, summary     written by RunDirectory
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any

from shared.experiment.contracts import AssayError
from shared.experiment.records import RecordDamaged, read_rows, read_summary

ROOT = Path(__file__).resolve().parents[2]
ARM_FILE, RUNS_FILE, CURVES_FILE = "arm.json", "runs.jsonl.gz", "curves.jsonl.gz"

Row = dict[str, float]


class MissingRecords(AssayError):
    """A study, arm or seed was asked for that has no complete record."""


class Results:
    """All complete records of one paper at one scale below `root`.

    Every method raises `MissingRecords` for what is not there and `RecordDamaged`, with the path, for what is broken.
    """

    def __init__(self, root: Path, paper: str, scale: str) -> None:
        self.dir = Path(root) / paper / scale
        self.paper = paper
        self.scale = scale

    @classmethod
    def committed(cls, paper: str, scale: str, root: Path = ROOT) -> Results:
        """The promoted records of a repository."""
        return cls(Path(root) / "results", paper, scale)

    @cached_property
    def _arms(self) -> dict[str, dict[str, _Arm]]:
        folders = [path for path in sorted(self.dir.glob("*/*")) if path.is_dir() and not path.name.startswith(".")]
        studies: dict[str, dict[str, _Arm]] = {}
        for path in folders:
            arm = _CommittedArm(path) if (path / ARM_FILE).exists() else _FreshArm(path)
            if arm.seeds:
                studies.setdefault(path.parent.name, {})[path.name] = arm
        return studies

    def _study(self, study: str) -> dict[str, _Arm]:
        if study not in self._arms:
            raise MissingRecords(f"no complete record of study {study} in {self.dir}: run it, then promote it")
        return self._arms[study]

    def _arm(self, study: str, arm: str) -> _Arm:
        if arm not in self._study(study):
            raise MissingRecords(
                f"no complete record of arm {arm} of study {study} in {self.dir}: run it, then promote it"
            )
        return self._arms[study][arm]

    def studies(self) -> tuple[str, ...]:
        """Names of the studies that have records."""
        return tuple(self._arms)

    def arms(self, study: str) -> tuple[str, ...]:
        """Names of the arms of `study` that have records, sorted."""
        return tuple(self._study(study))

    def seeds(self, study: str, arm: str) -> tuple[int, ...]:
        """Seeds with a complete record, ascending."""
        return self._arm(study, arm).seeds

    def summaries(self, study: str) -> dict[str, dict[int, dict[str, Any]]]:
        """arm -> seed -> what the run function returned."""
        return {arm: self.summary(study, arm) for arm in self.arms(study)}

    def summary(self, study: str, arm: str) -> dict[int, dict[str, Any]]:
        """seed -> what the run function returned."""
        return self._arm(study, arm).summaries

    def curves(self, study: str, arm: str) -> dict[int, list[Row]]:
        """seed -> rows of metrics.jsonl, each with `step`. Committed curves are thinned, see promote."""
        return self._arm(study, arm).curves

    def config(self, study: str, arm: str) -> dict[str, Any]:
        """The whole config of the arm as plain JSON, equal for all its seeds."""
        return self._arm(study, arm).config

    def config_hash(self, study: str, arm: str) -> dict[int, str]:
        """seed -> hash of the whole config."""
        return self._arm(study, arm).config_hash

    def provenance(self, study: str, arm: str) -> dict[int, dict[str, Any]]:
        """seed -> commit, hashes, versions, device."""
        return self._arm(study, arm).provenance

    def cost(self, study: str, arm: str) -> dict[int, dict[str, float]]:
        """seed -> cpu_s (CPU-seconds), wall_s (seconds), max_rss_mb (MiB)."""
        return self._arm(study, arm).cost


class _CommittedArm:
    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _head(self) -> dict[str, Any]:
        return parse(self.path / ARM_FILE, read(self.path / ARM_FILE))

    def _lines(self, name: str) -> dict[int, dict[str, Any]]:
        path = self.path / name
        try:
            content = gzip.decompress(read(path))
        except (OSError, EOFError, zlib.error) as error:
            raise RecordDamaged(f"{path} is damaged ({error}): restore it from git") from error
        if hashlib.sha256(content).hexdigest() != self._head["sha256"][name]:
            raise RecordDamaged(f"{path} does not match its checksum in {ARM_FILE}: restore it from git")
        return {row["seed"]: row for row in map(json.loads, content.splitlines())}

    @cached_property
    def _runs(self) -> dict[int, dict[str, Any]]:
        return self._lines(RUNS_FILE)

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(self._head["seeds"])

    @property
    def config(self) -> dict[str, Any]:
        return self._head["config"]

    @property
    def config_hash(self) -> dict[int, str]:
        value: str = self._head["config_hash"]
        return dict.fromkeys(self.seeds, value)

    @property
    def summaries(self) -> dict[int, dict[str, Any]]:
        return {seed: run["summary"] for seed, run in self._runs.items()}

    @property
    def provenance(self) -> dict[int, dict[str, Any]]:
        return {seed: run["provenance"] for seed, run in self._runs.items()}

    @property
    def cost(self) -> dict[int, dict[str, float]]:
        return {seed: run["cost"] for seed, run in self._runs.items()}

    @cached_property
    def curves(self) -> dict[int, list[Row]]:
        return {seed: from_columns(run["columns"]) for seed, run in self._lines(CURVES_FILE).items()}


class _FreshArm:
    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        found = (path.parent.name.removeprefix("seed") for path in self.path.glob("seed*/summary.json"))
        return tuple(sorted(int(name) for name in found if name.isdigit()))

    @cached_property
    def _records(self) -> dict[int, dict[str, Any]]:
        return {seed: read_summary(self.path / f"seed{seed}") for seed in self.seeds}

    def _json(self, name: str) -> dict[int, dict[str, Any]]:
        paths = {seed: self.path / f"seed{seed}" / name for seed in self._records}
        return {seed: parse(path, read(path)) for seed, path in paths.items()}

    @property
    def config(self) -> dict[str, Any]:
        return self._json("config.json")[self.seeds[0]]["config"]

    @property
    def config_hash(self) -> dict[int, str]:
        return {seed: config["config_hash"] for seed, config in self._json("config.json").items()}

    @property
    def summaries(self) -> dict[int, dict[str, Any]]:
        return {seed: record["summary"] for seed, record in self._records.items()}

    @property
    def provenance(self) -> dict[int, dict[str, Any]]:
        return self._json("provenance.json")

    @property
    def cost(self) -> dict[int, dict[str, float]]:
        return self._json("cost.json")

    @cached_property
    def curves(self) -> dict[int, list[Row]]:
        return {seed: read_rows(self.path / f"seed{seed}" / "metrics.jsonl") for seed in self._records}


_Arm = _CommittedArm | _FreshArm


def read(path: Path) -> bytes:
    """Content of a file of a record; a missing one is damage."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise RecordDamaged(f"{path} cannot be read ({error.strerror}): restore it or re-run") from error


def parse(path: Path, content: bytes) -> dict[str, Any]:
    """One JSON object."""
    try:
        return json.loads(content)
    except ValueError as error:
        raise RecordDamaged(f"{path} is not JSON ({error}): restore it or re-run") from error


def to_columns(rows: list[Row]) -> dict[str, list[float | None]]:
    """Rows as columns, in order of first appearance; None where a row lacks the metric."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def from_columns(columns: dict[str, list[float | None]]) -> list[Row]:
    """Inverse of `to_columns`."""
    length = len(columns["step"]) if columns else 0
    return [
        {name: value for name, column in columns.items() if (value := column[index]) is not None}
        for index in range(length)
    ]
