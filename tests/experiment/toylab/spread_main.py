"""Its command line: python -m tests.experiment.toylab.spread_main OUT STEPS SLEEP TP [ARM,ARM], also under torchrun."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from shared.experiment import launcher, ranks, torchrun
from shared.experiment.plan import Selection
from shared.megatron.layout import Layout
from tests.experiment.toylab.spread import EXPERIMENT


def main(out: str, steps: str, sleep: str, tp: str, arms: str = "plain") -> int:
    ranks.ALIKE_S = 3
    overrides = {"steps": steps, "sleep": sleep}
    selection = Selection(studies=("add",), arms=tuple(arms.split(",")), overrides=overrides)
    run = torchrun.run_experiment if torchrun.started_us() else launcher.run_experiment
    outcome = run(
        EXPERIMENT, "proxy", selection, Path(out), console=Console(), layout=Layout(tp=int(tp)), go_on="spread again"
    )
    print(*outcome.messages, sep="\n")
    return outcome.code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
