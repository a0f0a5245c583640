"""Runs as Slurm jobs, through submitit: one job per run, requeued with its checkpoint when its time is up.

    python -m papers run PAPER --study STUDY --scale gpu --tp 8 --dp 2 --slurm --nodes 2 --partition big --time 12:00:00

Special: a job is one torchrun agent per machine around the same ranks as on a laptop. Slurm warns `Slurm.warn_s`
seconds before the end of its time; the ranks write a checkpoint, and the job goes back into the queue under its id.
Complete runs are judged by the same command without `--slurm`.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.experiment import artifacts
from shared.experiment.contracts import Artifact, AssayError, Experiment, Interrupted
from shared.experiment.files import ensure_writable
from shared.experiment.group import Group, GroupTask, Nodes
from shared.experiment.launcher import prepare
from shared.experiment.layouts import check_layout
from shared.experiment.plan import Job, Selection, plan
from shared.experiment.pool import THREAD_VARIABLES
from shared.experiment.signals import request_stop
from shared.experiment.worker import CPU_SCALES, RunTask
from shared.megatron.layout import ImpossibleLayout, Layout

if TYPE_CHECKING:
    from rich.console import Console

REQUEUES = 1000
SECONDS_TO_REQUEUE = 60
CPUS_PER_GPU = 4
PORTS = range(20000, 30000)
OWN_FLAGS = {"signal": "--warn", "signal-delay-s": "--warn"}
OWN_FLAGS |= {name: f"--{name}" for name in ("nodes", "gpus-per-node", "partition", "time")}


class SubmititMissing(AssayError):
    """The package that talks to Slurm is not installed."""


class BadSlurmOption(AssayError):
    """An option for sbatch that cannot be read."""


class NoSlurm(AssayError):
    """This machine cannot submit jobs."""


@dataclass(frozen=True)
class Slurm:
    """What each job asks for. `minutes` is the wall time of one job; a longer run takes several.

    Slurm warns a job `warn_s` seconds before its end: enough for a step, a checkpoint and `SECONDS_TO_REQUEUE`.
    """

    nodes: int = 1
    gpus_per_node: int | None = None
    partition: str | None = None
    minutes: int = 60
    warn_s: int = 600
    sbatch: tuple[tuple[str, str], ...] = ()


def minutes(text: str) -> int:
    """Minutes of Slurm's `[D-]HH:MM:SS`, rounded up. Raises `BadSlurmOption`."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text)
    if match is None:
        raise BadSlurmOption(f"--time {text} is no time: write HH:MM:SS or D-HH:MM:SS.")
    days, hours, minutes_, seconds = (int(part or 0) for part in match.groups())
    return (days * 24 + hours) * 60 + minutes_ + (seconds > 0)


def sbatch_options(settings: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """`("account=lab",)` as pairs. Raises `BadSlurmOption`."""
    for setting in settings:
        if (name := setting.partition("=")[0]) in OWN_FLAGS:
            raise BadSlurmOption(f"--sbatch {setting}: that is said with {OWN_FLAGS[name]}.")
        if not re.fullmatch(r"[a-z][a-z-]*=.+", setting):
            raise BadSlurmOption(f"--sbatch {setting} has no value: write --sbatch NAME=VALUE, as account=lab.")
    return tuple((name, value) for name, _, value in (setting.partition("=") for setting in settings))


class ClusterJob:
    """What submitit calls once on each machine of a job; it travels as a pickle."""

    def __init__(self, task: GroupTask, needs: Sequence[Artifact], warn_s: int) -> None:
        self._task = task
        self._needs = tuple(needs)
        self._warn_s = warn_s
        self._group: Group | None = None

    def __call__(self) -> None:
        """Build what is missing, then work as this machine's part of the group.

        Raises `CodeChanged` if the code is not that of the submission, `Interrupted` after a stop that was no warning
        of Slurm's, else as `GroupTask.execute`.
        """
        import submitit

        os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
        self._task.check_code(
            {artifact.name: artifacts.address(artifact, self._task.scale) for artifact in self._needs}
        )
        here = submitit.JobEnvironment()
        # The lock lets one machine build, on a file system that all of them see.
        built = {artifact.name: artifacts.build(artifact, self._task.scale, _say) for artifact in self._needs}
        nodes = Nodes(here.num_nodes, here.node, _endpoint(here)) if here.num_nodes > 1 else Nodes()
        self._group = Group(replace(self._task, artifacts=built), nodes, _say)
        try:
            self._group.run()
        except Interrupted:
            if here.node:
                # Machine 0 puts the job back into the queue, which ends this process; leaving first would fail the job.
                time.sleep(SECONDS_TO_REQUEUE)
            raise

    def checkpoint(self) -> Any:
        """Called by submitit on machine 0 when Slurm warns: let the ranks write, then ask to be queued again."""
        from submitit.core.utils import DelayedSubmission

        request_stop()
        if self._group is not None:
            self._group.wait(self._warn_s - SECONDS_TO_REQUEUE)
        return DelayedSubmission(ClusterJob(self._task, self._needs, self._warn_s))


def submit(
    experiment: Experiment,
    scale: str,
    selection: Selection,
    runs_root: Path,
    *,
    console: Console,
    layout: Layout,
    slurm: Slurm,
    dry_run: bool = False,
) -> None:
    """Submit a job for every selected run without a complete record; `dry_run` prints the scripts, changes nothing.

    Raises `BadSlurmOption`, `SubmititMissing`, `ImpossibleLayout` if machines and processes do not fit, `NoSlurm`, and
    as `launcher.run_experiment` before any work.
    """
    _check_warning(slurm)
    executor = _executor(Path(runs_root) / "slurm" / experiment.paper, layout, scale, slurm, dry_run)
    if dry_run:
        jobs = plan(experiment, scale, selection)
        check_layout(experiment, jobs, scale, layout)
        for job in jobs:
            executor.update_parameters(job_name=_job_name(experiment, job))
            print(f"# {job.name}\n{executor._make_submission_file_text(executor._submitit_command_str, '')}")
        return
    prepared = prepare(experiment, scale, selection, runs_root, console=console, layout=layout)
    known = {artifact.name: artifact for artifact in experiment.artifacts}
    tasks = {entry.key: entry.task for entry in prepared.entries}
    for item in prepared.todo:
        task = tasks[item.job.name]
        assert isinstance(task, RunTask)
        if not isinstance(task, GroupTask):
            task = GroupTask(**{f.name: getattr(task, f.name) for f in fields(task)}, layout=layout)
        executor.update_parameters(job_name=_job_name(experiment, item.job))
        job = executor.submit(ClusterJob(task, [known[name] for name in item.job.study.artifacts], slurm.warn_s))
        console.print(f"{item.job.name}: job {job.job_id}, output in {job.paths.stdout}", markup=False, soft_wrap=True)
    if prepared.todo:
        console.print("When they are through, the same command without --slurm judges them.")


def _check_warning(slurm: Slurm) -> None:
    """A job that is warned as soon as it starts would be queued again without end."""
    if slurm.warn_s < 2 * SECONDS_TO_REQUEUE:
        raise BadSlurmOption(
            f"--warn {slurm.warn_s} leaves no time for a checkpoint: give at least {2 * SECONDS_TO_REQUEUE} seconds."
        )
    if slurm.minutes * 60 <= 2 * slurm.warn_s:
        raise BadSlurmOption(
            f"A job of {slurm.minutes} minutes that stops for its checkpoint {slurm.warn_s} s before the end hardly "
            "gets on: give it more --time, or a shorter --warn that still covers a step and a checkpoint."
        )


def _job_name(experiment: Experiment, job: Job) -> str:
    return f"{experiment.paper}-{job.study.name}-{job.arm}-{job.seed}"


def _executor(folder: Path, layout: Layout, scale: str, slurm: Slurm, dry_run: bool) -> Any:
    try:
        import submitit
    except ImportError as error:
        raise SubmititMissing("--slurm needs submitit: pip install 'assay[cluster]' (or submitit).") from error
    processes = _processes_per_node(layout, slurm)
    gpus = slurm.gpus_per_node if slurm.gpus_per_node is not None else (0 if scale in CPU_SCALES else processes)
    if gpus and gpus != processes:
        raise ImpossibleLayout(
            f"layout {layout} puts {processes} processes on each of {slurm.nodes} machines with {gpus} GPUs: use "
            "one GPU a process, so change the layout or --gpus-per-node"
        )

    class Executor(submitit.SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 2 if dry_run else super().affinity()

    if Executor.affinity() < 0:
        raise NoSlurm("There is no srun on this machine: use --slurm where jobs are submitted, or --slurm-dry-run.")
    executor = Executor(folder.resolve() if dry_run else ensure_writable(folder).resolve(), max_num_timeout=REQUEUES)
    wanted = {name.replace("-", "_"): value for name, value in slurm.sbatch}
    known = {name: value for name, value in wanted.items() if name in Executor._valid_parameters()}
    others = {name.replace("_", "-"): value for name, value in wanted.items() if name not in known}
    parameters: dict[str, Any] = {
        "nodes": slurm.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": processes * (CPUS_PER_GPU if gpus else 1),
        "gpus_per_node": gpus or None,
        "partition": slurm.partition,
        "time": slurm.minutes,
        "signal_delay_s": slurm.warn_s,
        "additional_parameters": {"requeue": True, **others},
    }
    parameters |= known
    # srun no longer takes the CPUs from sbatch (since Slurm 22.05). One machine that fails ends the others, which would
    # wait for it until a timeout.
    srun = [f"--cpus-per-task={parameters['cpus_per_task']}", "--kill-on-bad-exit=1"]
    executor.update_parameters(**parameters, srun_args=srun)
    return executor


def _processes_per_node(layout: Layout, slurm: Slurm) -> int:
    if slurm.nodes < 1 or layout.world_size % slurm.nodes:
        raise ImpossibleLayout(
            f"layout {layout} is {layout.world_size} processes, which {slurm.nodes} machines cannot share evenly: "
            "change --nodes or the layout"
        )
    return layout.world_size // slurm.nodes


def _say(text: str) -> None:
    print(text, flush=True)


def _endpoint(here: Any) -> str:
    """The first machine, with a port that every machine of the job comes to."""
    number = int("".join(filter(str.isdigit, here.job_id)))
    return f"{here.hostnames[0]}:{PORTS[number % len(PORTS)]}"
