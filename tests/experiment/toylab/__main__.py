"""The toy's own command line, for tests with signals: python -m tests.experiment.toylab OUT STEPS SLEEP WORKERS."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from shared.experiment.launcher import run_experiment
from shared.experiment.plan import Selection
from tests.experiment.toylab.experiment import EXPERIMENT


def main(out: str, steps: str, sleep: str, workers: str) -> int:
    selection = Selection(studies=("cold",), overrides={"steps": steps, "sleep": sleep})
    outcome = run_experiment(
        EXPERIMENT, "proxy", selection, Path(out), console=Console(), workers=int(workers), go_on="toylab again"
    )
    print(*outcome.messages, sep="\n")
    return outcome.code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
