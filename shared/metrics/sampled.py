"""Scores of benchmarks with n samples a problem: avg@n, pass@k, maj@n, two standard errors, and what went wrong.

    scores = score([[Sample(True, "42"), Sample(False, "41")], ...])
    scores.avg, scores.pass_at(4), scores.maj, scores.sampling_se, scores.problem_se

Special: a sample without a verdict (the harness failed) is no wrong answer. It leaves the denominators and is counted.
Formulas: section 1 of the evaluation protocol, docs/grading.md says what is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import nan, sqrt

from shared.experiment.contracts import AssayError
from shared.metrics.passk import pass_at_k


class TooFewSamples(AssayError):
    """A score is undefined for the samples at hand."""


@dataclass(frozen=True)
class Sample:
    """One generation. `correct` is None if the harness failed; `answer` is the extracted, normalised answer.

    A truncated generation counts as wrong and does not vote, whatever it says (section 2, step 4).
    """

    correct: bool | None
    answer: str | None = None
    truncated: bool = False

    @property
    def graded(self) -> bool:
        return self.truncated or self.correct is not None

    @property
    def right(self) -> bool:
        return self.correct is True and not self.truncated


@dataclass(frozen=True)
class Scores:
    """Scores of the samples of N problems; all are fractions in 0..1, percent is a matter of printing.

    Problems of which no sample has a verdict are left out (`problems_scored` < `problems`). Numbers of samples may
    differ between problems.
    """

    samples: tuple[tuple[Sample, ...], ...]

    @cached_property
    def counts(self) -> list[tuple[int, int]]:
        """(n_i, c_i) per scored problem: samples with a verdict, correct ones."""
        graded = [[sample for sample in row if sample.graded] for row in self.samples]
        return [(len(row), sum(sample.right for sample in row)) for row in graded if row]

    @property
    def problems(self) -> int:
        return len(self.samples)

    @property
    def problems_scored(self) -> int:
        return len(self.counts)

    @property
    def avg(self) -> float:
        """avg@n: mean over problems of c_i / n_i, the unbiased estimate of pass@1."""
        return _mean(self._rates)

    def pass_at(self, k: int) -> float:
        """Unbiased pass@k, mean over problems. Raises `TooFewSamples` if any problem has fewer than k verdicts."""
        if k < 1:
            raise ValueError(f"pass@k needs k >= 1, not {k}")
        short = sum(n < k for n, _ in self.counts) + self.problems - self.problems_scored
        if short:
            raise TooFewSamples(
                f"pass@{k} is undefined: {short} of {self.problems} problems have fewer than {k} samples with a "
                "verdict. Draw more samples, or ask for a smaller k."
            )
        return _mean([pass_at_k(n, c, k) for n, c in self.counts])

    @property
    def maj(self) -> float:
        """maj@n: share of problems whose most frequent answer is correct.

        Ties go to the answer seen first. Samples without an answer or a verdict, and truncated ones, do not vote; a
        problem without any vote counts as wrong.
        """
        return _mean([float(_majority(row)) for row in self.samples if any(sample.graded for sample in row)])

    @property
    def sampling_se(self) -> float:
        """sqrt(sum_i p_i (1 - p_i) / n_i) / N: noise of avg@n if the same problems are sampled again.

        With the estimate of p_i in place of p_i it is too small by about sqrt((n - 1) / n), and 0 for one sample.
        """
        return sqrt(sum(p * (1 - p) / n for p, (n, _) in zip(self._rates, self.counts, strict=True))) / len(self.counts)

    @property
    def problem_se(self) -> float:
        """std_i(p_i) / sqrt(N), with N - 1 in the std: noise of avg@n over problems. NaN for one problem."""
        n = len(self._rates)
        if n < 2:
            return nan
        mean = _mean(self._rates)
        return sqrt(sum((p - mean) ** 2 for p in self._rates) / (n - 1) / n)

    @property
    def truncated(self) -> float:
        """Fraction of all samples that were cut off."""
        return sum(sample.truncated for row in self.samples for sample in row) / self._total

    @property
    def unextracted(self) -> float:
        """Fraction of all samples without an answer, truncated ones included, harness errors not."""
        return sum(sample.graded and sample.answer is None for row in self.samples for sample in row) / self._total

    @property
    def harness_errors(self) -> int:
        """Number of samples without a verdict."""
        return sum(not sample.graded for row in self.samples for sample in row)

    @property
    def harness_error_fraction(self) -> float:
        """`harness_errors` over all samples."""
        return self.harness_errors / self._total

    @cached_property
    def _rates(self) -> list[float]:
        return [c / n for n, c in self.counts]

    @property
    def _total(self) -> int:
        return sum(map(len, self.samples))


def score(samples: Sequence[Sequence[Sample]]) -> Scores:
    """Scores of the samples of each problem, as generated. Raises `TooFewSamples` if none has a verdict."""
    scores = Scores(tuple(map(tuple, samples)))
    if not scores.counts:
        raise TooFewSamples("No sample has a verdict, so there is nothing to score: see the reasons of the grades.")
    return scores


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _majority(row: Sequence[Sample]) -> bool:
    voters = [sample for sample in row if sample.answer is not None and sample.correct is not None]
    voters = [sample for sample in voters if not sample.truncated]
    if not voters:
        return False
    # Counter keeps the order of first sight, and max takes the first of equals.
    votes = Counter(sample.answer for sample in voters)
    winner = max(votes, key=votes.__getitem__)
    return next(sample.right for sample in voters if sample.answer == winner)
