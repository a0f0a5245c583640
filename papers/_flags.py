"""Flags that say where, the layout of processes and Slurm, and what a dry run assumes. Standard library only."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from shared.experiment.contracts import AssayError
from shared.megatron.layout import Layout

if TYPE_CHECKING:
    from shared.dryrun.work import Assumptions
    from shared.experiment.cluster import Slurm

SIZES = {
    "tp": "tensor parallel size",
    "pp": "pipeline parallel size",
    "cp": "context parallel size",
    "dp": "data parallel size",
    "ep": "expert parallel size, inside tp * cp * dp",
    "virtual_pp": "model chunks per pipeline stage",
}
SWITCHES = {
    "sequence_parallel": "split activations along the sequence over the tensor parallel ranks",
    "distributed_optimizer": "shard optimizer state over the data parallel ranks",
    "overlap": "overlap gradient reduction with computation",
}

ASSUMED = {
    "mfu": (float, "X", "of training, as a share of the peak (default: 0.35)"),
    "gpu_tflops": (float, "X", "dense bfloat16 peak of one GPU (default: 989, H100 SXM)"),
    "gpu_gib": (float, "X", "usable memory of one GPU (default: 79, H100 of 80 GB)"),
    "mean_prompt": (int, "TOKENS", "average length (default: 256)"),
    "mean_response": (int, "TOKENS", "average length (default: 8192)"),
    "rollout_speed": (float, "TOKENS", "per second and GPU (default: what an MFU of 5 %% gives)"),
    "disk_gbs": (float, "GB", "per second, of a checkpoint that all ranks write (default: 1)"),
}


SLURM_ONLY = ("nodes", "gpus_per_node", "partition", "time", "warn", "sbatch")


class UselessFlag(AssayError):
    """A flag that the rest of the command leaves without effect."""


def add_layout(parser: argparse.ArgumentParser) -> None:
    """`--tp 2` and the like."""
    group = parser.add_argument_group("layout", "spread each run over tp * pp * cp * dp processes, see docs/cluster.md")
    for name, text in SIZES.items():
        group.add_argument(_flag(name), type=int, metavar="N", help=text)
    for name, text in SWITCHES.items():
        group.add_argument(_flag(name), action="store_true", default=None, help=text)
    group.add_argument(
        "--recompute", choices=("none", "selective", "full"), help="what the backward pass recomputes (default: none)"
    )


def layout(chosen: argparse.Namespace) -> Layout:
    """The layout that was asked for; without a flag, one process. Raises `ImpossibleLayout`."""
    return own_layout(chosen) or Layout()


def own_layout(chosen: argparse.Namespace) -> Layout | None:
    """The same, but None without a flag: `--dp 1` asks for one process. Raises `ImpossibleLayout`."""
    given = {name: getattr(chosen, name) for name in (*SIZES, *SWITCHES, "recompute")}
    given = {name: value for name, value in given.items() if value is not None}
    return Layout(**given) if given else None


def add_assumptions(parser: argparse.ArgumentParser) -> None:
    """`--mfu 0.4` and the like."""
    group = parser.add_argument_group("assumptions", "replace them with your measurements, see docs/dryrun.md")
    for name, (kind, metavar, text) in ASSUMED.items():
        group.add_argument(_flag(name), type=kind, metavar=metavar, help=text)


def assumptions(chosen: argparse.Namespace) -> Assumptions:
    """What was given, and defaults for the rest. Raises `BadAssumption`."""
    from shared.dryrun.work import Assumptions

    return Assumptions(**{name: value for name in ASSUMED if (value := getattr(chosen, name)) is not None})


def add_slurm(parser: argparse.ArgumentParser) -> None:
    """`--slurm` and what goes with it."""
    group = parser.add_argument_group("Slurm", "one job per run; needs pip install 'assay[cluster]'")
    group.add_argument("--slurm", action="store_true", help="submit the runs instead of working on them here")
    group.add_argument("--slurm-dry-run", action="store_true", help="print the sbatch scripts and submit nothing")
    group.add_argument("--nodes", type=int, metavar="N", help="machines per run (default: 1)")
    group.add_argument("--gpus-per-node", type=int, metavar="N", help="at gpu scale (default: one per process)")
    group.add_argument("--partition", help="default: the cluster's")
    group.add_argument("--time", metavar="[D-]HH:MM:SS", help="per job, a run goes on in the next (default: 01:00:00)")
    group.add_argument(
        "--warn",
        type=int,
        metavar="SECONDS",
        help="before a job's end: time for a step and a checkpoint (default: 600)",
    )
    group.add_argument(
        "--sbatch", action="append", metavar="NAME=VALUE", help="any other option of sbatch, as account=lab"
    )


def slurm(chosen: argparse.Namespace) -> Slurm:
    """What the jobs ask for. Raises `BadSlurmOption`."""
    from shared.experiment.cluster import Slurm, minutes, sbatch_options

    asked = {
        "nodes": chosen.nodes,
        "gpus_per_node": chosen.gpus_per_node,
        "partition": chosen.partition,
        "minutes": None if chosen.time is None else minutes(chosen.time),
        "warn_s": chosen.warn,
        "sbatch": None if chosen.sbatch is None else sbatch_options(chosen.sbatch),
    }
    return Slurm(**{name: value for name, value in asked.items() if value is not None})


def check(chosen: argparse.Namespace, by_torchrun: bool) -> None:
    """Raises `UselessFlag` for what `run` would not look at; `by_torchrun`: torchrun started this process."""
    from shared.experiment.worker import CPU_SCALES

    by_slurm = chosen.slurm or chosen.slurm_dry_run
    idle = [_flag(name) for name in SLURM_ONLY if getattr(chosen, name) is not None]
    if idle and not by_slurm:
        raise UselessFlag(f"{', '.join(idle)} means nothing without --slurm: add it, or --slurm-dry-run.")
    if chosen.gpus_per_node and chosen.scale in CPU_SCALES:
        raise UselessFlag(
            f"--gpus-per-node {chosen.gpus_per_node} asks for GPUs that scale {chosen.scale} leaves idle: leave it out."
        )
    if chosen.workers is not None and (by_slurm or by_torchrun):
        why = (
            "with --slurm every run is a job of its own" if by_slurm else "torchrun's processes share one run at a time"
        )
        raise UselessFlag(f"--workers means nothing here, {why}: leave it out.")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
