"""Records without training: what readers are tested on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared.experiment.claims import claims_hash
from shared.experiment.contracts import Claim, Experiment, Grid, Study
from shared.experiment.records import RunDirectory


def toy_claim(**changes: Any) -> Claim:
    fields = {
        "id": "b-above-a",
        "statement": "b scores higher than a",
        "strength": "must",
        "study": "main",
        "metric": "score",
        "contrast": {"b": 1.0, "a": -1.0},
        "n": 5,
        "paper_value": "+0.5",
    }
    return Claim(**(fields | changes))


def toy_experiment(*claims: Claim, seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 100)) -> Experiment:
    arms = {arm: {"arm": arm} for arm in ("a", "b")}
    study = Study("main", "is b above a?", arms, lambda _: {}, {"proxy": Grid(seeds)})
    return Experiment("toy", (), (study,), claims or (toy_claim(),))


def write_run(runs: Path, experiment: Experiment, arm: str, seed: int, summary: dict[str, Any], **changes: Any) -> Path:
    """One complete fresh record; `changes` replace `rows`, `config` or keys of the provenance."""
    folder = runs / experiment.paper / "proxy" / "main" / arm / f"seed{seed}"
    rows = changes.pop("rows", [{"step": step, "score": seed + step / 7} for step in range(4)])
    config = changes.pop("config", {"arm": arm})
    provenance = {
        "commit": "c0ffee",
        "dirty": False,
        "code_hash": "code",
        "claims_hash": claims_hash(experiment),
        "python": "3.12",
    }
    with RunDirectory.open(folder, config, seed, arm, "main", provenance=provenance | changes) as run:
        for row in rows:
            run.log(**row)
        run.finish(summary)
    return folder


def write_runs(
    runs: Path, experiment: Experiment, score: Callable[[str, int], Any], seeds: range = range(5), **changes: Any
) -> None:
    """Records of both arms, with `score(arm, seed)` as the only metric."""
    for arm in ("a", "b"):
        for seed in seeds:
            write_run(runs, experiment, arm, seed, {"score": score(arm, seed)}, **changes)


NOISE = (0.02, -0.01, 0.03, 0.0, -0.02)


def clear_difference(arm: str, seed: int) -> float:
    """b - a is about 0.5, with noise that pairing leaves in."""
    return seed + (0.5 + NOISE[seed % 5] if arm == "b" else 0.0)
