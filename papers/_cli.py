"""The command line of the papers: arguments in, one function call out, named errors as one sentence.

Standard library only at import; each command imports what it needs.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from papers import _flags as flags
from shared.experiment.contracts import AssayError

ROOT = Path(__file__).resolve().parents[1]
USAGE_ERROR = 2
EXAMPLES = """\
examples:
  python -m papers list                                   every paper, its verdicts, its cost
  python -m papers show cegppo                            claims in words, committed verdicts
  python -m papers run cegppo                             train and judge the headline set
  python -m papers run cegppo --scale smoke               plumbing only, under a minute
  python -m papers run cegppo --all                       the grid behind the committed table
  python -m papers run cegppo --study full --arm grpo --seed 3
  python -m papers run cegppo --study tabular --set lr=0.05    into proxy-custom, never judged with the rest
  python -m papers run cegppo --study full --tp 2 --dp 2       every run as a group of 4 processes, docs/cluster.md
  python -m papers promote cegppo                         copy complete records of a clean commit into results/
  python -m papers dryrun cegppo --size 7b                what the paper's own setting needs, docs/dryrun.md
"""


class _Parser(argparse.ArgumentParser):
    """Errors in one sentence, with the closest word where a choice is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"error: {message}. See: {self.prog} --help\n")


COMMANDS = ("list", "show", "run", "check", "promote", "tables", "canary", "dryrun")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 good, 1 a run failed or something differs, 2 wrong usage, 130 stopped."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words and not words[0].startswith("-") and words[0] not in COMMANDS:
            from shared.experiment.overrides import suggest

            raise suggest("command", words[0], COMMANDS)
        return _dispatch(_parser().parse_args(words), words)
    except AssayError as error:
        # Under torchrun all ranks of a machine meet the same error before runs start; machines may differ.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            rank = os.environ.get("RANK", "0")
            print(f"error{'' if rank == '0' else f' (rank {rank})'}: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    keep = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="python -m papers",
        description="LLM papers put to the test: a verdict per claim.",
        epilog=EXAMPLES,
        formatter_class=keep,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    listing = commands.add_parser("list", help="every paper with its verdicts and its cost")
    listing.add_argument("--json", action="store_true", help="for machines")
    show = commands.add_parser("show", help="one paper: claims, verdicts, cost")
    show.add_argument("paper")
    show.add_argument("--json", action="store_true", help="for machines")
    run = commands.add_parser("run", help="train and judge", epilog=EXAMPLES, formatter_class=keep)
    _add_run(run)
    check = commands.add_parser("check", help="are the committed results sound? trains nothing")
    promote = commands.add_parser("promote", help="copy complete records of a clean commit into results/")
    for command in (check, promote):
        command.add_argument("paper")
        command.add_argument("--scale", default="proxy", help="default: proxy")
        _add_out(command)
    tables = commands.add_parser("tables", help="regenerate tables, plots, README blocks and the board from results/")
    tables.add_argument("--check", action="store_true", help="write nothing, fail if something would change")
    canary = commands.add_parser("canary", help="replay the first steps of some arms, or record them anew")
    canary.add_argument("action", choices=("check", "record"))
    canary.add_argument("papers", nargs="*", help="default: all")
    _add_dryrun(commands.add_parser("dryrun", help="the paper's own setting: parameters, memory, hours, launch files"))
    return parser


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=ROOT / "runs", metavar="FOLDER", help="records (default: runs)")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paper")
    parser.add_argument("--scale", default="proxy", help="smoke, proxy (default) or gpu")
    parser.add_argument("--all", action="store_true", help="the whole grid, not only the headline set")
    parser.add_argument("--study", action="append", default=[], help="only this study; repeatable")
    parser.add_argument("--arm", action="append", default=[], help="only this arm; repeatable")
    parser.add_argument("--seed", action="append", default=[], type=int, help="only this seed; repeatable")
    parser.add_argument("--workers", type=_positive, help="runs at a time (default: one per physical core)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="override a field, `a.b` for nested ones"
    )
    parser.add_argument("--json", action="store_true", help="print the verdicts as JSON, everything else on stderr")
    _add_out(parser)
    flags.add_layout(parser)
    flags.add_slurm(parser)


def _add_dryrun(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paper")
    parser.add_argument("--size", action="append", default=[], help="only this model; repeatable (default: all)")
    flags.add_assumptions(parser)
    _add_out(parser)
    flags.add_layout(parser)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of processes")
    return int(text)


def _dispatch(chosen: argparse.Namespace, words: Sequence[str]) -> int:
    if chosen.command in ("list", "show"):
        from shared.experiment import board

        if chosen.command == "list":
            board.list_papers(chosen.json)
        else:
            board.show_paper(chosen.paper, chosen.json)
        return 0
    if chosen.command == "run":
        return _run(chosen, words)
    if chosen.command == "dryrun":
        return _dryrun(chosen)
    return 0 if _maintain(chosen) else 1


def _maintain(chosen: argparse.Namespace) -> bool:
    if chosen.command == "check":
        from shared.experiment import check

        return check.main(chosen.paper, chosen.out, chosen.scale)
    if chosen.command == "promote":
        from shared.experiment import promote

        return promote.main(chosen.paper, chosen.out, chosen.scale)
    if chosen.command == "tables":
        from shared.experiment.tables import tables

        return tables(chosen.check)
    from shared.experiment import canary

    return canary.main(chosen.action, chosen.papers)


def _run(chosen: argparse.Namespace, words: Sequence[str]) -> int:
    from rich.console import Console

    from shared.experiment import catalog, cluster, launcher, torchrun
    from shared.experiment.plan import Selection
    from shared.experiment.report import report

    console = Console(stderr=chosen.json, highlight=False)
    flags.check(chosen, torchrun.started_us())
    experiment, layout = catalog.experiment(chosen.paper), flags.layout(chosen)
    selection = Selection(
        whole_grid=chosen.all,
        studies=tuple(chosen.study),
        arms=tuple(chosen.arm),
        seeds=tuple(chosen.seed),
        overrides=_overrides(chosen.set),
    )
    what = (experiment, chosen.scale, selection, chosen.out)
    if chosen.slurm or chosen.slurm_dry_run:
        cluster.submit(*what, console=console, layout=layout, slurm=flags.slurm(chosen), dry_run=chosen.slurm_dry_run)
        return 0
    if torchrun.started_us():
        go_on = f"torchrun (with its options) -m papers {shlex.join(words)}"
        outcome = torchrun.run_experiment(*what, console=console, layout=layout, go_on=go_on)
        if not torchrun.is_first():
            return outcome.code
    else:
        go_on, workers = _same_command(words), chosen.workers
        outcome = launcher.run_experiment(*what, console=console, layout=layout, workers=workers, go_on=go_on)
    agrees = outcome.code == launcher.INTERRUPTED or report(experiment, outcome.folder, chosen.out, chosen.json)
    for message in outcome.messages:
        console.print(message, markup=False, soft_wrap=True)
    return outcome.code or int(not agrees)


def _dryrun(chosen: argparse.Namespace) -> int:
    from shared.dryrun.report import main

    layout, assumed = flags.own_layout(chosen), flags.assumptions(chosen)
    for table in main(chosen.paper, chosen.size, layout, assumed, chosen.out):
        print(table, end="\n\n")
    return 0


def _overrides(settings: Sequence[str]) -> dict[str, str]:
    from shared.experiment.overrides import BadValue

    for setting in settings:
        if "=" not in setting:
            raise BadValue(f"--set {setting} lacks a value: write --set {setting}=VALUE.")
    return {name.strip(): value for name, _, value in (setting.partition("=") for setting in settings)}


def _same_command(words: Sequence[str]) -> str:
    """How this user would start this command again: through nox if nox started it."""
    if Path(sys.prefix) == ROOT / ".nox" / "core":
        paper, rest = words[1], list(words[2:])
        return shlex.join(["nox", "-s", f"reproduce-{paper.replace('_', '-')}", *(["--", *rest] if rest else [])])
    return shlex.join(["python", "-m", "papers", *words])
