"""Measure, write results/ and fill README.md: `python -m bench [training|checkpoints|resume|tables ...]`."""

from __future__ import annotations

import argparse
import importlib
import json

from bench import report
from bench.measure import load_average, machine
from bench.shapes import CHECKPOINT_REPETITIONS, REPETITIONS, RESUME_REPETITIONS

ROUNDS = {"training": REPETITIONS, "checkpoints": CHECKPOINT_REPETITIONS, "resume": RESUME_REPETITIONS}


def measured(name: str, repetitions: int) -> str:
    """JSON of one result file."""
    about, before = machine(), load_average()
    entries = importlib.import_module(f"bench.{name}").measure(repetitions, lambda line: print(f"  {line}", flush=True))
    result = {
        "machine": about,
        "threads": 1,
        "load_average": {"before": before, "after": load_average()},
        "repetitions": repetitions,
        "entries": entries,
    }
    return json.dumps(result, indent=1, allow_nan=False) + "\n"


def main() -> None:
    """Everything, or what is named. With --repetitions nothing is written: other rounds are no result."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="training, checkpoints, resume, tables; all without")
    parser.add_argument("--repetitions", type=int, help="rounds; prints and writes nothing")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - {*ROUNDS, "tables"}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(ROUNDS)}, tables")
    for name in arguments.names or ROUNDS:
        if name == "tables":
            continue
        print(name, flush=True)
        text = measured(name, arguments.repetitions or ROUNDS[name])
        if arguments.repetitions is None:
            report.RESULTS.mkdir(exist_ok=True)
            (report.RESULTS / f"{name}.json").write_text(text)
    if arguments.repetitions is None:
        report.README.write_text(report.readme(report.README.read_text()))


if __name__ == "__main__":
    main()
