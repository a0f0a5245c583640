"""Copy complete records of a clean commit from `runs/` into `results/`, where they become the reference.

Special: promotion goes arm by arm and is repeatable: the same records give the same bytes. An arm is refused, by name,
if anything about it could be doubted; the other arms still go through.

    python -m papers promote cegppo

Curves are thinned to at most 200 rows a run, fewer where a paper has many runs (first, last and the rows with the most
metrics stay, the others evenly), and rounded to three significant digits: they are for figures. Summaries stay exact.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.experiment import catalog
from shared.experiment.claims import validate
from shared.experiment.contracts import AssayError, Experiment, Study
from shared.experiment.files import config_hash, writing
from shared.experiment.plan import arm_config
from shared.experiment.records import RecordDamaged
from shared.experiment.results import ARM_FILE, CURVES_FILE, ROOT, RUNS_FILE, Results, Row, to_columns

MIN_ROWS, MAX_ROWS = 12, 200
CURVE_BYTES = 200_000
BYTES_A_VALUE = 1.8


class Refused(AssayError):
    """Why an arm may not be promoted."""


@dataclass
class Promotion:
    """What happened: `study/arm` names, refused ones with a reason, and bytes now committed for the paper.

    `layouts` names the layouts of promoted arms with runs that were spread over processes.
    """

    promoted: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    layouts: dict[str, str] = field(default_factory=dict)
    size: int = 0


def main(paper: str, runs_root: Path, scale: str = "proxy") -> bool:
    """Promote the fresh runs of a paper and print what happened; False if an arm was refused or nothing was found."""
    outcome = promote(catalog.experiment(paper), scale, runs_root)
    for name in outcome.promoted:
        print(f"promoted: {name}")
    for name, layouts in outcome.layouts.items():
        print(f"note:     {name} ran under {layouts}: one process gives the same rows to about 1e-6, not to the bit")
    for name, reason in outcome.refused.items():
        print(f"refused:  {name}: {reason}")
    if not outcome.promoted and not outcome.refused:
        print(f"no complete records of {paper} at {scale} scale in {runs_root}: python -m papers run {paper} --all")
        return False
    if outcome.promoted:
        print(f"results/{paper} now holds {outcome.size / 1000:,.0f} kB of 1 MB. Next: nox -s tables, then commit.")
    return not outcome.refused


def promote(
    experiment: Experiment, scale: str = "proxy", runs_root: Path | None = None, root: Path = ROOT
) -> Promotion:
    """Promote every arm of `experiment` that has fresh records at `scale`.

    Refused: missing seeds, damaged records, a dirty tree, a commit that is not in the history, another config than the
    one declared now, mixed code inside a study. Records are evidence whatever they say: a run that began before the
    test of a claim was fixed is committed as well, and it is the claim that then stays `unresolved`.
    """
    validate(experiment)
    fresh = Results(runs_root or root / "runs", experiment.paper, scale)
    committed = Results.committed(experiment.paper, scale, root)
    outcome = Promotion()
    for study in experiment.studies:
        if scale not in study.scales or study.name not in fresh.studies():
            continue
        accepted = []
        for arm in declared_arms(study, scale):
            if arm in fresh.arms(study.name):
                try:
                    _check_arm(study, arm, fresh, root)
                    accepted.append(arm)
                except (Refused, RecordDamaged) as error:
                    outcome.refused[f"{study.name}/{arm}"] = str(error)
        mixed = _mixed_code(study, accepted, fresh, committed)
        if mixed:
            outcome.refused |= {f"{study.name}/{arm}": mixed for arm in accepted}
            continue
        for arm in accepted:
            _write_arm(committed.dir / study.name / arm, fresh, experiment, study, arm)
            outcome.promoted.append(f"{study.name}/{arm}")
            if layouts := _layouts(fresh.provenance(study.name, arm).values()):
                outcome.layouts[f"{study.name}/{arm}"] = ", ".join(sorted(layouts))
    outcome.size = size_of(experiment.paper, root)
    return outcome


def _layouts(provenances: Iterable[Mapping[str, Any]]) -> set[str]:
    """Layouts of more than one process under which any attempt of these runs worked."""
    attempts = [attempt for found in provenances for attempt in (found, *found.get("earlier", []))]
    return {attempt["layout"] for attempt in attempts if attempt.get("layout", "1") != "1"}


def declared_arms(study: Study, scale: str) -> tuple[str, ...]:
    """Arms of the study at a scale."""
    return study.scales[scale].arms or tuple(study.arms)


def size_of(paper: str, root: Path = ROOT) -> int:
    """Bytes committed for a paper."""
    return sum(path.stat().st_size for path in (root / "results" / paper).rglob("*") if path.is_file())


def _check_arm(study: Study, arm: str, fresh: Results, root: Path) -> None:
    """Raise `Refused` or `RecordDamaged` unless every declared seed may be committed."""
    declared = study.scales[fresh.scale].seeds
    missing = sorted(set(declared) - set(fresh.seeds(study.name, arm)))
    if missing:
        raise Refused(f"seeds {', '.join(map(str, missing))} are not complete: run {fresh.paper} with --all")
    wanted = config_hash(arm_config(study, arm, fresh.scale))
    provenance, found = fresh.provenance(study.name, arm), fresh.config_hash(study.name, arm)
    for seed in declared:
        # The launcher reuses complete records of equal code, so only a record moved away is made again.
        again = f"move {fresh.dir / study.name / arm / f'seed{seed}'} away and run it again"
        commit = provenance[seed]["commit"]
        if provenance[seed]["dirty"]:
            raise Refused(f"seed {seed} ran on a dirty tree: commit, then {again}")
        if not in_history(commit, root):
            raise Refused(f"seed {seed} ran on commit {commit[:10]}, which is not in the history: {again}")
        if found[seed] != wanted:
            raise Refused(f"seed {seed} ran with another config than the one declared now: run it again")


def _mixed_code(study: Study, accepted: list[str], fresh: Results, committed: Results) -> str:
    """Complaint if the study would hold records of different code, or nothing."""
    kept = (
        [arm for arm in committed.arms(study.name) if arm not in accepted] if study.name in committed.studies() else []
    )
    sources = [(fresh, arm) for arm in accepted] + [(committed, arm) for arm in kept if accepted]
    hashes: dict[str, str] = {}
    for results, arm in sources:
        provenance = results.provenance(study.name, arm)
        for seed in study.scales[fresh.scale].seeds:
            if seed in provenance:
                hashes.setdefault(provenance[seed]["code_hash"], arm)
    if len(hashes) < 2:
        return ""
    return f"arms {' and '.join(hashes.values())} ran on different code: run the whole study {study.name} again"


def _write_arm(target: Path, fresh: Results, experiment: Experiment, study: Study, arm: str) -> None:
    """Replace the committed folder of one arm in one step."""
    seeds = sorted(study.scales[fresh.scale].seeds)
    claims = {claim.id for claim in experiment.claims if claim.study == study.name and arm in claim.contrast}
    summaries, cost, curves = fresh.summary(study.name, arm), fresh.cost(study.name, arm), fresh.curves(study.name, arm)
    runs, columns = [], []
    for seed in seeds:
        provenance = dict(fresh.provenance(study.name, arm)[seed])
        hashes = provenance["claims_hash"] or {}
        provenance["claims_hash"] = {name: value for name, value in hashes.items() if name in claims}
        runs.append({"seed": seed, "summary": summaries[seed], "cost": cost[seed], "provenance": provenance})
        rows = _of_interest(study, curves[seed])
        rows = thin(rows, rows_a_run(experiment, fresh.scale, rows))
        columns.append({"seed": seed, "columns": to_columns([_rounded(row) for row in rows])})
    content = {RUNS_FILE: _lines(runs), CURVES_FILE: _lines(columns)}
    head = {
        "study": study.name,
        "arm": arm,
        "seeds": seeds,
        "commit": runs[0]["provenance"]["commit"],
        "code_hash": runs[0]["provenance"]["code_hash"],
        "config_hash": fresh.config_hash(study.name, arm)[seeds[0]],
        "config": fresh.config(study.name, arm),
        "sha256": {name: hashlib.sha256(text).hexdigest() for name, text in content.items()},
    }
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items())
    files = {ARM_FILE: f"{{\n{lines}\n}}\n".encode()}
    files |= {name: _compressed(text) for name, text in content.items()}
    with writing(target):
        _replace_folder(target, files)


def _replace_folder(target: Path, files: dict[str, bytes]) -> None:
    """A full disk leaves the folder as it was; a kill between the two renames is mended by the next promotion."""
    building, before = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
    shutil.rmtree(building, ignore_errors=True)
    if before.exists() and not target.exists():
        before.rename(target)
    try:
        building.mkdir(parents=True)
        for name, text in files.items():
            (building / name).write_bytes(text)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    if target.exists():
        target.rename(before)
    building.rename(target)
    shutil.rmtree(before, ignore_errors=True)


def _of_interest(study: Study, rows: list[Row]) -> list[Row]:
    """Rows with the metrics that the study wants to be committed."""
    if not study.curves:
        return rows
    return [{name: row[name] for name in ("step", *study.curves) if name in row} for row in rows]


def rows_a_run(experiment: Experiment, scale: str, rows: list[Row]) -> int:
    """How many rows of a run are kept: an equal part of the paper's budget for each declared run, within 12 to 200."""
    grids = [(study, study.scales[scale]) for study in experiment.studies if scale in study.scales]
    runs = sum(len(grid.seeds) * len(declared_arms(study, scale)) for study, grid in grids)
    metrics = max((len(row) for row in rows), default=1)
    return max(MIN_ROWS, min(MAX_ROWS, int(CURVE_BYTES / BYTES_A_VALUE / runs / metrics)))


def thin(rows: list[Row], limit: int) -> list[Row]:
    """At most `limit` rows: first and last, rows with more metrics than usual first, the others evenly."""
    if len(rows) <= limit:
        return rows
    widths = sorted(len(row) for row in rows)
    rich = [index for index, row in enumerate(rows) if len(row) > widths[len(rows) // 2]]
    kept = {0, len(rows) - 1} | set(_evenly(rich, max(0, limit // 2 - 2)))
    others = [index for index in range(len(rows)) if index not in kept]
    kept |= set(_evenly(others, limit - len(kept)))
    return [rows[index] for index in sorted(kept)]


def _evenly(items: list[int], count: int) -> list[int]:
    if len(items) <= count:
        return items
    return [items[(2 * k + 1) * len(items) // (2 * count)] for k in range(count)]


def _rounded(row: Row) -> Row:
    return {name: value if name == "step" else float(f"{value:.3g}") for name, value in row.items()}


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(
        json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n" for row in rows
    ).encode()


def _compressed(content: bytes) -> bytes:
    """gzip without name and date, so that equal content gives equal bytes."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=buffer, mtime=0) as file:
        file.write(content)
    return buffer.getvalue()


def in_history(commit: str, root: Path = ROOT) -> bool:
    """True if `commit` is HEAD or one of its ancestors."""
    command = ["git", "-C", str(root), "merge-base", "--is-ancestor", commit, "HEAD"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
