"""The scores against closed forms and enumeration, and a simulated model: unbiased means, intervals that cover."""

import math
from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.metrics.sampled import Sample, TooFewSamples, score

REPLICATIONS = 1000
samples = st.builds(
    Sample,
    st.sampled_from([True, False, None]),
    st.sampled_from([None, "a", "b"]),
    st.sampled_from([False, False, True]),
)
tables = st.lists(st.lists(samples, max_size=6), min_size=1, max_size=5)


def graded(row):
    return [s for s in row if s.correct is not None or s.truncated]


@given(tables)
def test_equals_a_plain_reading_of_the_formulas(table):
    rows = [graded(row) for row in table if graded(row)]
    if not rows:
        with pytest.raises(TooFewSamples, match="No sample has a verdict"):
            score(table)
        return
    p = np.array([np.mean([bool(s.correct) and not s.truncated for s in row]) for row in rows])
    n = np.array([len(row) for row in rows])
    scores = score(table)
    everything = [s for row in table for s in row]
    assert scores.avg == pytest.approx(p.mean())
    assert scores.sampling_se == pytest.approx(np.sqrt((p * (1 - p) / n).sum()) / len(p))
    assert scores.problem_se == pytest.approx(p.std(ddof=1) / np.sqrt(len(p)) if len(p) > 1 else math.nan, nan_ok=True)
    assert scores.truncated == pytest.approx(np.mean([s.truncated for s in everything]))
    assert scores.harness_errors == len(everything) - n.sum()
    assert scores.problems_scored == len(rows)


@given(tables, st.integers(1, 4))
def test_pass_at_k_is_undefined_where_any_problem_has_too_few_samples(table, k):
    if not any(map(graded, table)):
        return
    if min(len(graded(row)) for row in table) < k:
        with pytest.raises(TooFewSamples, match=f"pass@{k} is undefined"):
            score(table).pass_at(k)
    else:
        assert 0 <= score(table).pass_at(k) <= 1


def test_pass_at_one_is_avg():
    table = [[Sample(True), Sample(False), Sample(False)], [Sample(True)]]
    assert score(table).pass_at(1) == pytest.approx(score(table).avg) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("row", "correct"),
    [
        ("A b b", False),
        ("A A b", True),
        ("b A A b", False),  # a tie: b was seen first
        ("A b b A", True),
        ("- - - A", True),  # samples without an answer do not vote
        ("- -", False),
        ("? A b b ?", False),
        ("b b! b! A A", True),  # truncated samples do not vote
    ],
)
def test_majority(row, correct):
    """A: correct answer, b: a wrong one, -: no answer, ?: the harness failed, !: truncated."""
    letters = {"A": True, "b": False, "-": False, "?": None}
    table = [[Sample(letters[w[0]], None if w[0] in "-?" else w[0], "!" in w) for w in row.split()]]
    assert score(table).maj == correct


def test_a_harness_error_is_no_wrong_answer():
    table = [[Sample(True, "1"), Sample(None, "1")], [Sample(None)], [Sample(False, "2"), Sample(True, "1")]]
    scores = score(table)
    assert (scores.avg, scores.harness_errors, scores.harness_error_fraction) == (0.75, 2, 0.4)
    assert (scores.problems, scores.problems_scored) == (3, 2)


def test_a_truncated_sample_is_wrong_even_if_its_answer_is_right_or_was_never_graded():
    scores = score([[Sample(True, "1", truncated=True), Sample(None, truncated=True), Sample(True, "1")]])
    assert (scores.avg, scores.harness_errors, scores.truncated) == (pytest.approx(1 / 3), 0, pytest.approx(2 / 3))
    assert scores.unextracted == pytest.approx(1 / 3)


def majority_target(rates, n):
    """P(the majority is correct) over all sequences of n answers; `rates` = P(answer j); answer 0 is correct."""
    total = 0.0
    for answers in product(range(len(rates)), repeat=n):
        votes = Counter(answers)
        total += math.prod(rates[a] for a in answers) * (max(votes, key=votes.__getitem__) == 0)
    return total


@pytest.fixture(scope="module")
def simulated():
    """1,000 replications of a model: 40 problems with known success, two wrong answers each, a tenth truncated."""
    rng = np.random.default_rng(7)
    rates_N = rng.beta(0.8, 1.2, size=40)
    draws = []
    for _ in range(REPLICATIONS):
        u_Nn, cut_Nn = rng.random((40, 32)), rng.random((40, 32)) < 0.1
        wrong_Nn = np.where(rng.random((40, 32)) < 0.7, "b", "c")
        rows = [
            [Sample(bool(u < p), "A" if u < p else w, bool(cut)) for u, w, cut in zip(*row, strict=True)]
            for p, *row in zip(rates_N, u_Nn, wrong_Nn, cut_Nn, strict=True)
        ]
        draws.append(score(rows))
    return rates_N * 0.9, draws


def test_avg_and_pass_at_k_are_unbiased_on_a_simulated_model(simulated):
    rates_N, draws = simulated
    for estimates, target in (
        ([s.avg for s in draws], rates_N.mean()),
        ([s.pass_at(8) for s in draws], (1 - (1 - rates_N) ** 8).mean()),
    ):
        # Four standard errors of the mean over replications: fails by chance once in 16,000.
        assert abs(np.mean(estimates) - target) < 4 * np.std(estimates) / np.sqrt(REPLICATIONS)
        assert np.std(estimates) < 0.02


def test_the_sampling_error_covers(simulated):
    rates_N, draws = simulated
    covered = np.mean([abs(s.avg - rates_N.mean()) <= 1.96 * s.sampling_se for s in draws])
    assert 0.93 <= covered <= 0.97


def test_the_problem_error_covers_the_mean_over_all_problems():
    """New problems in each replication, 60 of them: the interval is about the population that they come from."""
    rng = np.random.default_rng(11)
    covered = []
    for _ in range(REPLICATIONS):
        right = rng.random((60, 16)) < rng.beta(2.0, 2.0, size=(60, 1))
        scores = score([[Sample(bool(cell)) for cell in row] for row in right])
        covered.append(abs(scores.avg - 0.5) <= 1.96 * scores.problem_se)
    assert 0.93 <= np.mean(covered) <= 0.97


@pytest.mark.parametrize("n", [3, 4])
def test_majority_vote_equals_its_enumerated_target(n):
    rng = np.random.default_rng(n)
    rates = [(0.5, 0.3, 0.2), (0.3, 0.4, 0.3), (0.25, 0.25, 0.5)]
    target = np.mean([majority_target(r, n) for r in rates])
    names = np.array(["A", "b", "c"])
    means = []
    for _ in range(REPLICATIONS):
        rows = [[Sample(a == "A", str(a)) for a in rng.choice(names, size=n, p=r)] for r in rates]
        means.append(score(rows).maj)
    assert abs(np.mean(means) - target) < 4 * np.std(means) / np.sqrt(REPLICATIONS)
