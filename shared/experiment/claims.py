"""From records to verdicts: evaluate the claims of an experiment, and compare fresh runs with committed ones.

Special: a claim only resolves on runs that began after its test was fixed (every record carries the hash of the test),
on the first `n` declared seeds below 100, and with nothing missing. The rules in prose: docs/verdicts.md.

    results = Results.committed("cegppo", "proxy")
    for result in evaluate_all(EXPERIMENT, results):
        print(result.claim.id, result.effect, result.verdict, result.reason)
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard

from shared.experiment.contracts import AssayError, Claim, Experiment, Study
from shared.experiment.results import MissingRecords, Results
from shared.experiment.statistics import MIN_SEEDS, Verdict, bca, paired_t, verdict

Summaries = Mapping[str, Mapping[int, Mapping[str, Any]]]
Status = Literal["identical", "OK", "drifted", "FAIL", "-"]
FIRST_FREE_SEED = 100
SAME_VALUE = 1e-12
CUSTOM = "-custom"
SCREENFUL = 20


class ClaimError(AssayError):
    """A claim does not fit its experiment."""


class _Unusable(Exception):
    """Records exist and cannot decide; the message becomes the reason."""


@dataclass(frozen=True)
class ClaimResult:
    """A judged claim. `effect`, `low`, `high` are None where they do not exist.

    `values` holds the contrasts the interval was computed from, keyed "seed" or "seed/index" ("*/index" for items,
    which are averaged over seeds first).
    """

    claim: Claim
    effect: float | None
    low: float | None
    high: float | None
    n_seeds: int
    verdict: Verdict
    reason: str = ""
    values: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The entry of claims.json; numbers keep six significant digits, so that no last bit moves the file."""
        return {
            "id": self.claim.id,
            "statement": self.claim.statement,
            "strength": self.claim.strength,
            "metric": self.claim.metric,
            "effect": _six(self.effect),
            "ci95": [_six(self.low), _six(self.high)],
            "n_seeds": self.n_seeds,
            "verdict": self.verdict,
            "paper_value": self.claim.paper_value,
            "study": self.claim.study,
            "contrast": dict(self.claim.contrast),
            "threshold": self.claim.threshold,
            "side": self.claim.side,
            "unit": self.claim.unit,
            "n_planned": self.claim.n,
            "n_units": len(self.values),
            "reason": self.reason,
        }


def claims_json(judged: list[ClaimResult]) -> str:
    """Text of claims.json."""
    return json.dumps([result.to_json() for result in judged], indent=1, ensure_ascii=False) + "\n"


def claims_hash(experiment: Experiment) -> dict[str, str]:
    """claim id -> hash of its test, stored in the provenance of each run when it begins.

    The test is what decides: study, metric, contrast, n, threshold, side, unit. Words, strength and the paper's value
    may be corrected later without new runs.
    """
    return {claim.id: _test_hash(claim) for claim in experiment.claims}


def fixed_before(claim: Claim, provenance: Mapping[str, Any]) -> bool:
    """True if a run began with exactly this test declared."""
    return (provenance["claims_hash"] or {}).get(claim.id) == _test_hash(claim)


def _test_hash(claim: Claim) -> str:
    test = [claim.study, claim.metric, sorted(claim.contrast.items()), claim.n, claim.threshold, claim.side, claim.unit]
    return hashlib.sha256(json.dumps(test).encode()).hexdigest()[:16]


def validate(experiment: Experiment) -> None:
    """Raise `ClaimError` for a claim that cannot be judged: unknown study or arm, duplicate id, too few seeds."""
    studies = {study.name: study for study in experiment.studies}
    seen: set[str] = set()
    for claim in experiment.claims:
        if claim.id in seen:
            raise ClaimError(f"claim id {claim.id} appears twice in {experiment.paper}: rename one")
        seen.add(claim.id)
        if claim.study not in studies:
            raise ClaimError(f"claim {claim.id} names study {claim.study}: choose one of {', '.join(studies)}")
        study = studies[claim.study]
        unknown = [arm for arm in claim.contrast if arm not in study.arms]
        if unknown:
            raise ClaimError(f"claim {claim.id} names arm {unknown[0]}: choose one of {', '.join(study.arms)}")
        if claim.unit == "seed" and claim.n < MIN_SEEDS:
            raise ClaimError(
                f"claim {claim.id} plans {claim.n} seeds and could never resolve: plan {MIN_SEEDS} or more"
            )
        planned = judged_seeds(study, claim, "proxy")
        if "proxy" in study.scales and len(planned) < claim.n:
            raise ClaimError(
                f"claim {claim.id} plans {claim.n} seeds, study {study.name} declares {len(planned)} below "
                f"{FIRST_FREE_SEED} at proxy scale: declare more"
            )


def judged_seeds(study: Study, claim: Claim, scale: str) -> tuple[int, ...]:
    """The seeds that decide: the first `claim.n` declared ones below 100. Choices are made on the others.

    Runs with overridden configs lie under `<scale>-custom` and use the seeds of the scale.
    """
    grid = study.scales.get(scale.removesuffix(CUSTOM))  # pyright: ignore[reportArgumentType]
    declared = grid.seeds if grid else ()
    return tuple(seed for seed in declared if seed < FIRST_FREE_SEED)[: claim.n]


def evaluate_all(experiment: Experiment, results: Results) -> list[ClaimResult]:
    """All claims in order of declaration; missing runs give `unresolved`, damaged records raise `RecordDamaged`."""
    validate(experiment)
    return [evaluate(experiment, claim, results) for claim in experiment.claims]


def evaluate(experiment: Experiment, claim: Claim, results: Results) -> ClaimResult:
    """Judge one claim on the records at hand.

    With fewer than `claim.n` seeds the interval so far is shown and the verdict stays `unresolved`.
    """
    study = next(study for study in experiment.studies if study.name == claim.study)
    planned = judged_seeds(study, claim, results.scale)
    try:
        summaries = results.summaries(claim.study)
    except MissingRecords:
        summaries = {}
    seeds = [seed for seed in planned if all(seed in summaries.get(arm, {}) for arm in claim.contrast)]
    if not seeds:
        missing = [arm for arm in claim.contrast if not summaries.get(arm)]
        return _unresolved(claim, 0, f"no runs of {', '.join(missing)}" if missing else "no seed has every arm")
    try:
        values = _contrasts(claim, summaries, seeds)
    except _Unusable as error:
        return _unresolved(claim, len(seeds), str(error))
    estimate = (paired_t if claim.unit == "seed" else bca)(list(values.values()))
    objection = _objection(claim, results, seeds)
    judged = "unresolved" if objection else verdict(estimate, claim.threshold, claim.side)
    reason = objection or estimate.reason
    return ClaimResult(claim, estimate.effect, estimate.low, estimate.high, len(seeds), judged, reason, values)


def _unresolved(claim: Claim, n_seeds: int, reason: str) -> ClaimResult:
    return ClaimResult(claim, None, None, None, n_seeds, "unresolved", reason)


def _objection(claim: Claim, results: Results, seeds: list[int]) -> str:
    """Why these runs may not decide, or nothing."""
    for arm in claim.contrast:
        provenance = results.provenance(claim.study, arm)
        for seed in seeds:
            if not fixed_before(claim, provenance[seed]):
                return f"{arm} seed {seed} began before this test was fixed"
    return f"{len(seeds)} of {claim.n} seeds so far" if len(seeds) < claim.n else ""


def _contrasts(claim: Claim, summaries: Summaries, seeds: list[int]) -> dict[str, float]:
    """Values of the contrast, by unit."""
    if claim.unit == "seed":
        return {
            str(seed): _combine(claim, [_number(claim, summaries, arm, seed) for arm in claim.contrast])
            for seed in seeds
        }
    by_seed = {seed: _elements(claim, summaries, seed) for seed in seeds}
    if claim.unit == "point":
        return {f"{seed}/{index}": value for seed, row in by_seed.items() for index, value in enumerate(row)}
    lengths = {len(row) for row in by_seed.values()}
    if len(lengths) > 1:
        raise _Unusable(f"seeds hold different numbers of items: {sorted(lengths)}")
    columns = zip(*by_seed.values(), strict=True)
    return {f"*/{index}": math.fsum(column) / len(seeds) for index, column in enumerate(columns)}


def _combine(claim: Claim, per_arm: list[float]) -> float:
    return math.fsum(weight * value for weight, value in zip(claim.contrast.values(), per_arm, strict=True))


def _elements(claim: Claim, summaries: Summaries, seed: int) -> list[float]:
    lists = [summaries[arm][seed].get(claim.metric) for arm in claim.contrast]
    for arm, values in zip(claim.contrast, lists, strict=True):
        if not isinstance(values, list) or len(values) != len(lists[0] or ()):
            raise _Unusable(f"{arm} seed {seed}: {claim.metric} is not a list as long as that of the other arms")
        if not all(_finite(value) for value in values):
            raise _Unusable(f"{arm} seed {seed}: {claim.metric} holds a value that is not finite")
    return [_combine(claim, list(values)) for values in zip(*lists, strict=True)]  # pyright: ignore[reportArgumentType]


def _number(claim: Claim, summaries: Summaries, arm: str, seed: int) -> float:
    value = summaries[arm][seed].get(claim.metric)
    if not _finite(value):
        raise _Unusable(f"{arm} seed {seed}: {claim.metric} is {value}")
    return float(value)


def _finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _six(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def principal(judged: Sequence[ClaimResult]) -> list[ClaimResult]:
    """What fits a screen or a figure: up to 20 claims all of them, beyond that those of strength must and should."""
    if len(judged) <= SCREENFUL:
        return list(judged)
    return [result for result in judged if result.claim.strength != "may"]


def compare(fresh: ClaimResult, committed: ClaimResult) -> Status:
    """Does a fresh result agree with the committed one?

    identical  every fresh contrast equals the committed one of the same seed or item to 1e-12
    OK         the fresh effect lies in the committed interval, or the intervals overlap and both effects lie on the
               same side of the threshold
    drifted    the intervals overlap, and the effects lie on different sides of the threshold
    FAIL       the intervals share no point
    -          one of the two has no interval and the fresh effect does not lie in the committed one
    """
    if fresh.effect is None or committed.effect is None:
        return "-"
    shared = [key for key in fresh.values if key in committed.values]
    if len(shared) == len(fresh.values) and all(
        math.isclose(fresh.values[key], committed.values[key], rel_tol=SAME_VALUE, abs_tol=SAME_VALUE) for key in shared
    ):
        return "identical"
    if committed.low is None or committed.high is None:
        return "-"
    if committed.low <= fresh.effect <= committed.high:
        return "OK"
    if fresh.low is None or fresh.high is None:
        return "-"
    if fresh.high < committed.low or fresh.low > committed.high:
        return "FAIL"
    threshold = fresh.claim.threshold
    return "OK" if (fresh.effect > threshold) == (committed.effect > threshold) else "drifted"
