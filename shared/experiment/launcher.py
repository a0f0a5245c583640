"""From an experiment and a selection to complete records: reuse, resume, run, and say which.

    outcome = run_experiment(EXPERIMENT, "proxy", Selection(), Path("runs"))

Reused are complete records of equal config and code; incomplete ones resume; stale and damaged ones are moved aside and
made again. One failing run does not stop the others. Runs with overridden fields live in `<scale>-custom`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.experiment import artifacts, codehash, progress, provenance, warm, worker
from shared.experiment.claims import claims_hash, validate
from shared.experiment.contracts import Artifact, AssayError, Experiment
from shared.experiment.cores import available_cores
from shared.experiment.files import RunBusy, config_hash, ensure_writable, move_aside
from shared.experiment.group import GroupTask, naming_tmpdir
from shared.experiment.layouts import check_layout
from shared.experiment.overrides import suggest
from shared.experiment.plan import Job, Selection, plan
from shared.experiment.pool import Entry, Pool
from shared.experiment.records import Status, lock_of, status
from shared.experiment.worker import BuildTask, RunTask
from shared.megatron.layout import Layout

if TYPE_CHECKING:
    from rich.console import Console

INTERRUPTED, FAILED = 130, 1
SHOWN = 6


class DeclarationError(AssayError):
    """An experiment contradicts itself."""


@dataclass(frozen=True)
class Outcome:
    """How a launch ended.

    `code` is the exit status: 0, 1 if a run failed, 130 if it was stopped. `folder` is the scale's folder under the
    paper's. `messages` says what failed or stopped and how to go on; empty if all is well.
    """

    code: int
    folder: str
    complete: int
    left: int
    messages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Planned:
    """One run, and what its record held when it was looked at."""

    job: Job
    path: Path
    code_hash: str
    found: Status


@dataclass(frozen=True)
class Prepared:
    """What a launch is about: every run, the entries to work on, and the artifacts that are there already."""

    planned: list[Planned]
    entries: list[Entry]
    built: dict[str, artifacts.Built]
    root: Path

    @property
    def todo(self) -> list[Planned]:
        """Runs without a complete record."""
        return [item for item in self.planned if item.found.kind != "complete"]

    @property
    def folder(self) -> str:
        """The scale's folder under the paper's."""
        return self.root.name


def run_experiment(
    experiment: Experiment,
    scale: str,
    selection: Selection,
    runs_root: Path,
    *,
    console: Console,
    workers: int | None = None,
    layout: Layout | None = None,
    go_on: str = "run the same command again",
) -> Outcome:
    """Bring every selected run to a complete record; `go_on` is the command that a stopped user is told.

    `layout` spreads each run over processes, which together count as one of the `workers`.
    Raises an `AssayError` before any work for unknown names, unwritable folders, layouts that a study or a model does
    not allow, runs that another process works on, and a TMPDIR with too long a path.
    """
    layout = layout or Layout()
    prepared = prepare(experiment, scale, selection, runs_root, console=console, layout=layout)
    if not prepared.todo:
        return Outcome(0, prepared.folder, len(prepared.planned), 0)
    workers = workers or (1 if scale == "gpu" else max(1, available_cores() // layout.world_size))
    studies = {item.job.study.name: item.job.study for item in prepared.todo}.values()
    reached = {name for study in studies for name in codehash.reached_modules(experiment.paper, study)}
    agent = () if layout == Layout() else ("torch.distributed.launcher.api",)
    preload = [worker.__name__, *sorted(reached), *agent, warm.__name__]
    processes = f", {layout.world_size} processes each ({layout})" if agent else ""
    _say(console, f"Workers: {workers}{processes}. Records: {prepared.root}")
    with naming_tmpdir(), progress.display(console, prepared.entries, workers) as observer:
        finished = Pool(prepared.entries, workers, preload, observer, prepared.built).run()
    return conclude(prepared, finished, go_on)


def prepare(
    experiment: Experiment, scale: str, selection: Selection, runs_root: Path, *, console: Console, layout: Layout
) -> Prepared:
    """Check everything, say what is reused, and move untrusted records aside. Raises as `run_experiment`."""
    validate(experiment)
    _check_headlines(experiment)
    jobs = plan(experiment, scale, selection)
    check_layout(experiment, jobs, scale, layout)
    folder = f"{scale}-custom" if selection.overrides else scale
    root = ensure_writable(Path(runs_root) / experiment.paper / folder)
    addresses = _addresses(experiment, jobs, scale)
    planned = _look(experiment, jobs, root, addresses)
    _refuse_busy(planned)
    _tell(console, planned)
    todo = [item for item in planned if item.found.kind != "complete"]
    built = _built(experiment, todo, scale, console)
    return Prepared(planned, _entries(experiment, todo, scale, layout, addresses, built), built, root)


def _check_headlines(experiment: Experiment) -> None:
    """The headline set is a part of the proxy grid, so that both share records."""
    for study in experiment.studies:
        head, grid = study.headline, study.scales.get("proxy")
        if head is None:
            continue
        arms = set(study.arms if grid is None or grid.arms is None else grid.arms)
        inside = grid is not None and set(head.seeds) <= set(grid.seeds) and set(head.arms or ()) <= arms
        if not inside or head.overrides:
            raise DeclarationError(
                f"The headline of study {study.name} is no part of its proxy grid: take arms and seeds from there, "
                "and leave overrides out."
            )


def _addresses(experiment: Experiment, jobs: Sequence[Job], scale: str) -> dict[str, str]:
    """Artifact name -> content address, for those that the jobs need."""
    known = {artifact.name: artifact for artifact in experiment.artifacts}
    needed = dict.fromkeys(name for job in jobs for name in job.study.artifacts)
    for name in needed:
        if name not in known:
            raise suggest("artifact", name, known)
    return {name: artifacts.address(known[name], scale) for name in needed}


def _look(experiment: Experiment, jobs: Sequence[Job], root: Path, addresses: Mapping[str, str]) -> list[Planned]:
    hashes: dict[str, str] = {}
    planned = []
    for job in jobs:
        name = job.study.name
        if name not in hashes:
            hashes[name] = codehash.study_hash(experiment.paper, job.study, addresses)
        path = root / name / job.arm / f"seed{job.seed}"
        planned.append(Planned(job, path, hashes[name], status(path, config_hash(job.config), hashes[name])))
    return planned


def _refuse_busy(planned: Sequence[Planned]) -> None:
    for item in planned:
        lock = lock_of(item.path)
        if item.found.kind != "complete" and lock.path.exists():
            if not lock.acquire():
                busy = f"{item.path} is being run by process {lock.holder()}"
                raise RunBusy(f"{busy}: wait for it, or choose another folder with --out.")
            lock.release()


def _tell(console: Console, planned: Sequence[Planned]) -> None:
    """Say what is reused, resumed and made again, and move the untrusted aside."""
    counts = Counter(item.found.kind for item in planned)
    words = {
        "complete": "complete and reused",
        "incomplete": "resumed",
        "missing": "new",
        "stale": "made again because config or code changed",
        "damaged": "made again because damaged",
    }
    parts = ", ".join(f"{counts[kind]} {text}" for kind, text in words.items() if counts[kind])
    console.print(f"{len(planned)} runs: {parts}.", highlight=False, soft_wrap=True)
    for kind, verb in (("incomplete", "resumes"), ("stale", "moved aside"), ("damaged", "moved aside")):
        items = [item for item in planned if item.found.kind == kind]
        for number, item in enumerate(items):
            aside = move_aside(item.path, kind).name if verb == "moved aside" else ""
            if number < SHOWN or kind == "damaged":
                detail = f" to {aside} ({item.found.detail})" if aside else ""
                _say(console, f"  {item.job.name} {verb}{detail}")
        if len(items) > SHOWN and kind != "damaged":
            _say(console, f"  and {len(items) - SHOWN} more {verb}")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _needed(experiment: Experiment, todo: Sequence[Planned]) -> list[Artifact]:
    names = {name for item in todo for name in item.job.study.artifacts}
    return [artifact for artifact in experiment.artifacts if artifact.name in names]


def _built(experiment: Experiment, todo: Sequence[Planned], scale: str, console: Console) -> dict[str, artifacts.Built]:
    """Entry key -> artifact, for those that are in the cache and whole."""
    built = {}
    for artifact in _needed(experiment, todo):
        try:
            found = artifacts.find(artifacts.address(artifact, scale))
        except artifacts.ArtifactDamaged as damage:
            _say(console, f"{damage} It will be built again.")
            continue
        if found is not None:
            _say(console, f"Artifact {found.address} is in the cache.")
            built[_key(artifact)] = found
    return built


def _key(artifact: Artifact) -> str:
    return f"artifact {artifact.name}"


def _entries(
    experiment: Experiment,
    todo: Sequence[Planned],
    scale: str,
    layout: Layout,
    addresses: Mapping[str, str],
    built: Mapping[str, artifacts.Built],
) -> list[Entry]:
    entries = []
    for artifact in _needed(experiment, todo):
        if _key(artifact) not in built:
            task = BuildTask(artifact, scale, addresses[artifact.name])
            entries.append(Entry(_key(artifact), "artifacts", task, artifact.cost_cpu_s if scale == "proxy" else 1.0))
    origin = {**provenance.collect(), "claims_hash": claims_hash(experiment), "threads": 1, "layout": str(layout)}
    for item in todo:
        job = item.job
        record: dict[str, Any] = {**origin, "code_hash": item.code_hash}
        parts = (job.study.run, item.path, job.config, job.seed, job.arm, job.study.name, scale)
        rest = ({}, record, experiment.paper)
        task = RunTask(*parts, *rest) if layout == Layout() else GroupTask(*parts, *rest, layout)
        needs = {name: f"artifact {name}" for name in job.study.artifacts}
        # Declared costs are those of the proxy scale; elsewhere runs count alike until they are measured.
        cost = job.study.cost_cpu_s if scale == "proxy" else 1.0
        entries.append(Entry(job.name, job.study.name, task, cost, needs))
    return entries


def conclude(prepared: Prepared, finished: bool, go_on: str) -> Outcome:
    """How the launch ended, from the endings of its entries; `finished` is False if a signal cut it short."""
    planned, entries, folder = prepared.planned, prepared.entries, prepared.folder
    runs = [entry for entry in entries if isinstance(entry.task, RunTask)]
    left = sum(entry.ending != "done" for entry in runs)
    complete = len(planned) - left
    # Without a stop of ours, a run that stopped was stopped by somebody else: that is a failure to report.
    failed = [entry for entry in entries if entry.ending == "failed" or (finished and entry.ending == "stopped")]
    messages = [f"FAILED {entry.key}: {entry.error}{_where(entry)}" for entry in failed]
    state = f"{complete} of {len(planned)} runs complete"
    if not finished:
        resumable = sum(entry.ending == "stopped" for entry in entries)
        messages.append(f"Stopped: {state}, {resumable} resumable. Go on with: {go_on}")
        return Outcome(INTERRUPTED, folder, complete, left, tuple(messages))
    if failed:
        messages.append(f"{state}. Once the cause is gone, run the others with: {go_on}")
        return Outcome(FAILED, folder, complete, left, tuple(messages))
    return Outcome(0, folder, complete, 0)


def _where(entry: Entry) -> str:
    return f" (traceback: {entry.error_file})" if entry.error_file else ""
