"""Two studies: `cold` starts at a constant, `warm` at an artifact."""

from __future__ import annotations

from shared.experiment.contracts import Artifact, Claim, Experiment, Grid, Study
from tests.experiment.toylab.runs import Quadratic, Start, build_start, descend

COLD = Study(
    name="cold",
    question="Does it descend?",
    arms={"slow": Quadratic(lr=0.01), "fast": Quadratic(lr=0.2)},
    run=descend,
    scales={"smoke": Grid((0,), overrides={"steps": 4}), "proxy": Grid((0, 1, 2, 3, 4))},
    headline=Grid((0, 1), arms=("slow", "fast")),
    cost_cpu_s=0.1,
)
WARM = Study(
    name="warm",
    question="And from elsewhere?",
    arms={"plain": Quadratic()},
    run=descend,
    scales={"proxy": Grid((0,))},
    artifacts=("start",),
    cost_cpu_s=0.2,
)
CLAIM = Claim("faster", "fast ends lower", "must", "cold", "loss", {"slow": 1.0, "fast": -1.0}, n=5)

EXPERIMENT = Experiment(
    paper="toylab", artifacts=(Artifact("start", build_start, Start()),), studies=(COLD, WARM), claims=(CLAIM,)
)
