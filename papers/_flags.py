"""Flags of `run` that say where: the layout of processes and Slurm. Standard library only."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from shared.megatron.layout import Layout

if TYPE_CHECKING:
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


def add_layout(parser: argparse.ArgumentParser) -> None:
    """`--tp 2` and the like."""
    group = parser.add_argument_group("layout", "spread each run over tp * pp * cp * dp processes, see docs/cluster.md")
    for name, text in SIZES.items():
        group.add_argument(_flag(name), type=int, default=1, metavar="N", help=text)
    for name, text in SWITCHES.items():
        group.add_argument(_flag(name), action="store_true", help=text)
    group.add_argument(
        "--recompute", choices=("none", "selective", "full"), default="none", help="what the backward pass recomputes"
    )


def layout(chosen: argparse.Namespace) -> Layout:
    """The layout that was asked for. Raises `ImpossibleLayout`."""
    return Layout(**{name: getattr(chosen, name) for name in (*SIZES, *SWITCHES, "recompute")})


def add_slurm(parser: argparse.ArgumentParser) -> None:
    """`--slurm` and what goes with it."""
    group = parser.add_argument_group("Slurm", "one job per run; needs pip install 'assay[cluster]'")
    group.add_argument("--slurm", action="store_true", help="submit the runs instead of working on them here")
    group.add_argument("--slurm-dry-run", action="store_true", help="print the sbatch scripts and submit nothing")
    group.add_argument("--nodes", type=int, default=1, metavar="N", help="machines per run")
    group.add_argument(
        "--gpus-per-node", type=int, metavar="N", help="default: one per process at gpu scale, none below"
    )
    group.add_argument("--partition", help="default: the cluster's")
    group.add_argument("--time", default="01:00:00", metavar="[D-]HH:MM:SS", help="per job; a run goes on in the next")
    group.add_argument(
        "--sbatch", action="append", default=[], metavar="NAME=VALUE", help="any other option of sbatch, as account=lab"
    )


def slurm(chosen: argparse.Namespace) -> Slurm:
    """What the jobs ask for. Raises `BadSlurmOption`."""
    from shared.experiment.cluster import Slurm, minutes, sbatch_options

    return Slurm(
        nodes=chosen.nodes,
        gpus_per_node=chosen.gpus_per_node,
        partition=chosen.partition,
        minutes=minutes(chosen.time),
        sbatch=sbatch_options(chosen.sbatch),
    )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
