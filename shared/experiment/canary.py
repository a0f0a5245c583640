"""Canaries: the first steps of one arm per study, replayed in CI, so that no change moves numbers unnoticed.

Special: values that were moved on purpose are recorded anew, and from then on the board calls the committed records of
that study stale until they come from newer code.

    python -m papers canary check                   every paper; names step, metric and both values
    python -m papers canary record cegppo           after a change that was meant

A study takes part by naming `Study.canary`. It runs at its grid `canary` if it has one, else at `smoke`, on the first
seed. Trajectories that sample tokens can part between machines after one different bit: such studies give the canary
an arm that replays a stored rollout. Recorded in results/<paper>/canary.json.
"""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from shared.experiment import catalog
from shared.experiment.artifacts import build
from shared.experiment.contracts import AssayError, Experiment, Interrupted, Study
from shared.experiment.files import write_atomic
from shared.experiment.plan import arm_config
from shared.experiment.records import RunDirectory
from shared.experiment.results import ROOT, Results, Row, parse, read

STEPS = 20
RELATIVE = 1e-4
ABSOLUTE = 1e-9


class CanaryMissing(AssayError):
    """Nothing was recorded to compare with."""


class _FirstSteps(RunDirectory):
    """A record that asks its run to stop once it has logged enough."""

    def stop_requested(self) -> bool:
        return len(self.rows()) >= STEPS or super().stop_requested()


def main(action: Literal["check", "record"], papers: Sequence[str]) -> bool:
    """Check or record the canaries of some papers, all if none is named. Prints what moved; False if anything did."""
    sound = True
    for paper in papers or catalog.experiments():
        experiment = catalog.experiment(paper)
        if action == "record":
            print(f"recorded: {record(experiment).relative_to(ROOT)}")
            continue
        moved = check(experiment)
        print("\n".join(moved) or f"{paper}: canaries as recorded ({len(_taking_part(experiment))} studies)")
        sound = sound and not moved
    if not sound:
        print("If that was meant: python -m papers canary record PAPER, then run and promote what became stale.")
    return sound


def check(experiment: Experiment, root: Path = ROOT) -> list[str]:
    """Replay the canaries of a paper; one sentence per study that moved, naming the first step and metric that did."""
    known = recorded(experiment.paper, root)
    moved = []
    for study in _taking_part(experiment):
        if study.name not in known:
            raise CanaryMissing(
                f"{experiment.paper} has no canary for study {study.name}: "
                f"python -m papers canary record {experiment.paper}"
            )
        difference = first_difference(known[study.name]["rows"], replay(experiment, study))
        if difference:
            moved.append(f"{experiment.paper} {study.name}: {difference}")
    return moved


def record(experiment: Experiment, root: Path = ROOT) -> Path:
    """Write canary.json. What did not move keeps its bytes; what moved makes the study's committed records stale."""
    known = recorded(experiment.paper, root)
    entries = {}
    for study in _taking_part(experiment):
        old, rows = known.get(study.name), replay(experiment, study)
        if old and not first_difference(old["rows"], rows):
            entries[study.name] = old
            continue
        codes = sorted(_committed_codes(study.name, Results.committed(experiment.paper, "proxy", root))) if old else []
        stale = {"since": _head(root), "code_hashes": codes}
        entries[study.name] = {"arm": study.canary, "stale": stale if codes else None, "rows": rows}
    path = _path(experiment.paper, root)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, _text(entries))
    return path


def stale_studies(results: Results, root: Path = ROOT) -> dict[str, str]:
    """study -> commit since which its committed records come from code that gives other numbers."""
    entries = {name: entry["stale"] for name, entry in recorded(results.paper, root).items() if entry["stale"]}
    return {
        name: stale["since"]
        for name, stale in entries.items()
        if _committed_codes(name, results) & set(stale["code_hashes"])
    }


def first_difference(expected: list[Row], found: list[Row]) -> str:
    """First step and metric whose values differ by more than 1e-4 of the larger one, or nothing."""
    if len(expected) != len(found):
        return f"{len(expected)} steps were recorded, {len(found)} came back"
    for before, now in zip(expected, found, strict=True):
        if before.keys() != now.keys():
            return f"step {before['step']}: metrics {', '.join(sorted(before.keys() ^ now.keys()))} came or went"
        for name, value in before.items():
            if not math.isclose(value, now[name], rel_tol=RELATIVE, abs_tol=ABSOLUTE):
                return f"step {before['step']}: {name} was {value!r}, is {now[name]!r}"
    return ""


def replay(experiment: Experiment, study: Study) -> list[Row]:
    """The first 20 logged rows of the study's canary, run in this process on one thread in a temporary folder."""
    arm, grid = study.canary or "", "canary" if "canary" in study.scales else "smoke"
    config, seed = arm_config(study, arm, grid), study.scales[grid].seeds[0]
    declared = {artifact.name: artifact for artifact in experiment.artifacts}
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: build(declared[name], "smoke").path for name in study.artifacts}
        run = _FirstSteps.open(
            Path(folder) / "run", config, seed, arm, study.name, "smoke", artifacts=paths, provenance={}
        )
        with run, contextlib.suppress(Interrupted):
            study.run(run)
        return run.rows()[:STEPS]


def _taking_part(experiment: Experiment) -> list[Study]:
    return [study for study in experiment.studies if study.canary]


def _path(paper: str, root: Path) -> Path:
    return root / "results" / paper / "canary.json"


def recorded(paper: str, root: Path = ROOT) -> dict[str, Any]:
    """study -> entry of canary.json; empty if there is none."""
    path = _path(paper, root)
    return parse(path, read(path)) if path.exists() else {}


def _committed_codes(study: str, results: Results) -> set[str]:
    if study not in results.studies():
        return set()
    arms = results.arms(study)
    return {provenance["code_hash"] for arm in arms for provenance in results.provenance(study, arm).values()}


def _text(entries: Mapping[str, Any]) -> str:
    """JSON with one row a line, so that a moved value is one line of a diff."""
    studies = []
    for name, entry in entries.items():
        rows = ",\n".join("  " + json.dumps(row) for row in entry["rows"])
        head = json.dumps({key: value for key, value in entry.items() if key != "rows"})
        studies.append(f' {json.dumps(name)}: {head[:-1]}, "rows": [\n{rows}\n ]}}')
    return "{\n" + ",\n".join(studies) + "\n}\n"


def _head(root: Path) -> str:
    command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
