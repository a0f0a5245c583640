"""Can the committed results of a paper be believed? Asks the records themselves; trains nothing.

    python -m papers check cegppo      committed records, then fresh ones beside them if there are any

Looked at: declaration of the claims, checksums of every committed file, configs equal to those
declared now, claims.json equal to what the records say, runs that began before a test was fixed, missing canaries.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from shared.experiment import canary, catalog
from shared.experiment.claims import claims_json, evaluate_all, fixed_before, judged_seeds, validate
from shared.experiment.contracts import AssayError, Experiment
from shared.experiment.files import config_hash
from shared.experiment.plan import arm_config
from shared.experiment.promote import declared_arms
from shared.experiment.report import report
from shared.experiment.results import ROOT, Results


def main(paper: str, runs_root: Path, scale: str = "proxy", root: Path = ROOT) -> bool:
    """Print what is wrong with the committed results and, if there are fresh runs, how they compare."""
    experiment = catalog.experiment(paper)
    found = list(problems(experiment, root))
    for problem in found:
        print(problem)
    print(f"{paper}: {len(found)} problems in results/{paper}" if found else f"{paper}: committed results are sound")
    fresh = Results(runs_root, paper, scale).studies()
    return (report(experiment, scale, runs_root, root=root) if fresh else True) and not found


def problems(experiment: Experiment, root: Path = ROOT) -> Iterator[str]:
    """One sentence per reason to doubt, over all committed scales."""
    try:
        validate(experiment)
    except AssayError as error:
        yield str(error)
        return
    folder = root / "results" / experiment.paper
    for scale in sorted(path.name for path in folder.glob("*") if path.is_dir()):
        results = Results.committed(experiment.paper, scale, root)
        try:
            yield from _record_problems(experiment, results)
            yield from _claim_problems(experiment, results)
        except AssayError as error:
            yield str(error)
    recorded = canary.recorded(experiment.paper, root)
    for study in experiment.studies:
        if study.canary and study.name not in recorded:
            yield f"study {study.name} has no canary: python -m papers canary record {experiment.paper}"


def _record_problems(experiment: Experiment, results: Results) -> Iterator[str]:
    studies = {study.name: study for study in experiment.studies if results.scale in study.scales}
    for name in results.studies():
        if name not in studies:
            yield f"{results.dir / name} belongs to no study: delete it"
            continue
        for arm in results.arms(name):
            where = results.dir / name / arm
            results.curves(name, arm)
            if arm not in declared_arms(studies[name], results.scale):
                yield f"{where} belongs to no declared arm: delete it"
            elif set(results.config_hash(name, arm).values()) != {
                config_hash(arm_config(studies[name], arm, results.scale))
            }:
                yield f"{where} ran with another config than the one declared now: run and promote it again"


def _claim_problems(experiment: Experiment, results: Results) -> Iterator[str]:
    studies = {study.name: study for study in experiment.studies}
    for claim in experiment.claims:
        if claim.study not in results.studies():
            continue
        seeds = judged_seeds(studies[claim.study], claim, results.scale)
        for arm in claim.contrast:
            provenance = results.provenance(claim.study, arm) if arm in results.arms(claim.study) else {}
            late = [seed for seed in seeds if seed in provenance and not fixed_before(claim, provenance[seed])]
            if late:
                yield f"claim {claim.id} was fixed after {arm} seed {late[0]} of study {claim.study} began"
    path = results.dir / "claims.json"
    text = claims_json(evaluate_all(experiment, results))
    if results.studies() and (not path.exists() or path.read_text(encoding="utf-8") != text):
        yield f"{path} is not what the records say: python -m papers tables"
