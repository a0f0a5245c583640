"""Countdown against an independent oracle: Python's own arithmetic on the text, and brute force over all plays."""

import re
from itertools import permutations, product

import numpy as np
import pytest

from shared.data.tasks import base
from shared.data.tasks.base import Problem, Verdict, split_of_residue
from shared.data.tasks.characters import encode
from shared.data.tasks.countdown import (
    EOS,
    FIRST_WORD,
    STYLES,
    PlainCountdown,
    StyledCountdown,
    solutions,
    zipf_probabilities,
)

PLAIN = PlainCountdown()
STYLED = StyledCountdown()
PROBLEM = Problem((9, 6, 9), 63)


def oracle(problem: Problem, text: str) -> bool:
    """Independent judgement of a compact response text with a leading `a op b = c` form, by eval of each step."""
    if not re.fullmatch(r"\d+[-+*]\d+=\d+(;\d+[-+*]\d+=\d+)*\$", text) or re.search(r"(?<!\d)0\d", text):
        return False
    pool = sorted(problem.numbers)
    for step in text[:-1].split(";"):
        left, result = step.split("=")
        operands = sorted(int(v) for v in re.split(r"[-+*]", left))
        rest = list(pool)
        try:
            for v in operands:
                rest.remove(v)
        except ValueError:
            return False
        if eval(left) != int(result) or not 0 <= int(result) <= 99:
            return False
        pool = [*rest, int(result)]
    return pool == [problem.target]


def brute_force_targets(numbers: tuple[int, ...]) -> set[int]:
    """Targets reachable by ordered play, written without the module's enumeration."""
    if len(numbers) == 1:
        return {numbers[0]}
    reachable = set()
    for i, j in permutations(range(len(numbers)), 2):
        rest = tuple(v for k, v in enumerate(numbers) if k not in (i, j))
        for op in "+-*":
            result = eval(f"{numbers[i]}{op}{numbers[j]}")
            if 0 <= result <= 99:
                reachable |= brute_force_targets((*rest, result))
    return reachable


def test_targets_are_exactly_the_reachable_ones():
    for numbers in product(range(1, 5), repeat=3):
        reachable = brute_force_targets(numbers)
        assert reachable == {target for target in range(100) if solutions(Problem(numbers, target))}


def test_every_mutation_of_a_derivation_agrees_with_the_oracle():
    rng = np.random.default_rng(0)
    checked = {True: 0, False: 0}
    for problem in PLAIN.problems("sft", 40, seed=0):
        text = "".join(PLAIN.render(PLAIN.derivation(problem, rng)))
        mutants = {text[:i] + new + text[i + 1 :] for i in range(len(text) - 1) for new in "0123456789+-*=;"}
        mutants |= {text[:i] + text[i + 1 :] for i in range(len(text))}
        first, *others = text[:-1].split(";")
        mutants.add(";".join([*others, first]) + "$")
        a, op, b = re.match(r"(\d+)([-+*])(\d+)", text).groups()
        mutants.add(text.replace(f"{a}{op}{b}", f"{b}{op}{a}", 1))
        for mutant in mutants:
            correct = oracle(problem, mutant)
            verdict = PLAIN.verify(problem, encode(mutant))
            assert verdict.correct == correct, (problem, mutant, verdict)
            checked[correct] += 1
    assert checked[True] > 40
    assert checked[False] > 4000


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("6*9=54;54+9=63$", base.OK),
        ("9*6=54;9+54=63$", base.OK),
        ("54=9*6;63=9+54$", base.OK),
        (" 6 * 9 = 54 ;63 = 54+ 9$", base.OK),
        ("6*9=54;54+9=63", base.NO_EOS),
        ("", base.NO_EOS),
        ("$", base.FORMAT),
        ("6*9=54;54+9=63;$", base.FORMAT),
        ("6*9=54;54+9=63$$", base.FORMAT),
        ("6*9=5 4;54+9=63$", base.FORMAT),
        ("06*9=54;54+9=63$", base.FORMAT),
        ("6-9=-3;54+9=63$", base.FORMAT),
        ("6*9=54$", base.STEPS),
        ("6*9=54;54+9=63;63+0=63$", base.STEPS),
        ("6*6=36;36+9=45$", base.OPERAND),
        ("6*9=54;6+9=15$", base.OPERAND),
        ("54+9=63;6*9=54$", base.OPERAND),
        ("6*9=55;55+9=64$", base.ARITHMETIC),
        ("9+9=18;18*6=108$", base.RANGE),
        ("6*9=54;54-9=45$", base.TARGET),
    ],
)
def test_plain_reason_codes(text, reason):
    assert PLAIN.verify(PROBLEM, encode(text)) == Verdict(reason == base.OK, reason)


def test_plain_styles_look_as_documented():
    rng = np.random.default_rng(0)
    texts = {}
    for style in STYLES:
        task = PlainCountdown(styles=(style,))
        texts[style] = {task.render(task.derivation(PROBLEM, rng)) for _ in range(200)}
    assert texts["ascending"] == {"6*9=54;9+54=63$"}
    assert texts["swapped"] == {f"{a};{b}$" for a in ("6*9=54", "9*6=54") for b in ("9+54=63", "54+9=63")}
    assert texts["spaced"] == {t.replace("*", " * ").replace("+", " + ").replace("=", " = ").replace(";", " ; ")
                               for t in texts["swapped"]}  # fmt: skip
    assert "54=9*6;63=54+9$" in texts["result_first"]
    assert len(texts["result_first"]) == 4
    with pytest.raises(ValueError, match="backwards"):
        PlainCountdown(styles=("backwards",))


def test_recipe_h_layout():
    assert STYLED.vocab_size == 284
    rng = np.random.default_rng(0)
    for problem in STYLED.problems("sft", 500, seed=0):
        n1, n2, n3 = problem.numbers
        assert max(problem.numbers) <= 12
        assert STYLED.prompt(problem) == [1, 3 + n1, 3 + n2, 3 + n3, 106, 3 + problem.target, 107]
        ids = STYLED.derivation(problem, rng)
        assert len(ids) == 21
        for i in range(2):
            w0, w1, w2, synonym, a, op, b, equals, c, w3 = ids[10 * i : 10 * i + 10]
            assert [(w - 156) // 16 for w in (w0, w1, w2, w3)] == [4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3]
            assert (synonym - 108) // 16 == op - 103
            assert equals == 106
            assert eval(f"{a - 3}{'+-*'[op - 103]}{b - 3}") == c - 3
    assert StyledCountdown(numbers=(3, 4)).vocab_size == 284 + 4 * 16


def test_recipe_h_split():
    def residue(problem):
        return (7 * sum(31 * n**2 for n in problem.numbers) + 13 * problem.target) % 16

    assert {residue(p) for p in STYLED.problems("eval", 128, seed=0)} == {0, 1}
    assert {residue(p) for p in STYLED.problems("rl", 500, seed=0)} == set(range(2, 8))
    assert {residue(p) for p in STYLED.problems("sft", 500, seed=0)} == set(range(8, 16))
    assert [split_of_residue(v) for v in (1, 2, 7, 8)] == ["eval", "rl", "rl", "sft"]


def test_recipe_h_words_follow_zipf_and_swaps_are_fair():
    p_R = zipf_probabilities(16, 2.0)
    # 16 words; the facts' 1.470 belongs to regime T's 32 tokens. Synonym positions add the choice of the operator.
    assert -(p_R * np.log(p_R)).sum() == pytest.approx(1.35276, abs=1e-5)
    t_R = zipf_probabilities(32, 2.0)
    assert -(t_R * np.log(t_R)).sum() == pytest.approx(1.470, abs=1e-3)
    rng = np.random.default_rng(0)
    counts_R = np.zeros(16)
    swapped = commutative = 0
    for problem in STYLED.problems("sft", 5000, seed=0):
        ids = STYLED.derivation(problem, rng)
        np.add.at(counts_R, [(token - FIRST_WORD) % 16 for token in ids if token >= FIRST_WORD], 1)
        a, op, b = ids[4:7]
        if op != 104 and a != b:
            commutative += 1
            swapped += a > b
    expected_R = p_R * counts_R.sum()
    chi_square = ((counts_R - expected_R) ** 2 / expected_R).sum()
    assert chi_square < 37.7  # 99.9 % point of chi-square with 15 degrees of freedom
    assert abs(swapped / commutative - 0.5) < 4 * 0.5 / commutative**0.5


def styled(*core: int | str) -> list[int]:
    """Ids of a response written as numbers, operators and `w` for a style word, eos added."""
    symbols = {"+": 103, "-": 104, "*": 105, "=": 106, ":": 107, "w": 200, "eos": EOS, "pad": 0}
    return [3 + s if isinstance(s, int) else symbols[s] for s in core] + [EOS]


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        (styled("w", 6, "*", 9, "=", 54, "w", 54, "+", 9, "=", 63), base.OK),
        (styled(6, "w", "*", "w", 9, "=", 54, 9, "+", 54, "=", 63, "w"), base.OK),
        (styled(6, "*", 9, "=", 54, 54, "+", 9, "=", 63)[:-1], base.NO_EOS),
        ([*styled(6, "*", 9, "=", 54, 54, "+", 9, "=", 63), 200], base.NO_EOS),
        ([], base.NO_EOS),
        (styled(6, "*", 9, "=", 54, 54, "+", 9, "=", 63, "pad"), base.FORMAT),
        (styled(6, "*", 9, "=", 54, "eos", 54, "+", 9, "=", 63), base.FORMAT),
        (styled(6, "*", 9, "+", 54, 54, "+", 9, "=", 63), base.FORMAT),
        (styled(6, ":", 9, "=", 54, 54, "+", 9, "=", 63), base.FORMAT),
        (styled("w", "w"), base.STEPS),
        (styled(6, "*", 9, "=", 54), base.STEPS),
        (styled(6, "*", 6, "=", 36, 36, "+", 9, "=", 45), base.OPERAND),
        (styled(6, "*", 9, "=", 53, 53, "+", 9, "=", 62), base.ARITHMETIC),
        (styled(6, "*", 9, "=", 54, 54, "-", 9, "=", 45), base.TARGET),
    ],
)
def test_styled_reason_codes(ids, reason):
    assert STYLED.verify(PROBLEM, ids) == Verdict(reason == base.OK, reason)


def test_words_never_change_the_verdict():
    rng = np.random.default_rng(0)
    for problem in STYLED.problems("sft", 200, seed=1):
        ids = STYLED.derivation(problem, rng)
        core = [token for token in ids if token < FIRST_WORD]
        assert STYLED.verify(problem, core).correct
        broken = list(ids)
        place = broken.index(106) + 1
        broken[place] = 3 + (broken[place] - 3 + 1) % 100
        assert STYLED.verify(problem, broken).reason == base.ARITHMETIC


def test_styled_renders_words_by_class():
    assert STYLED.render([1, 12, 103, 106, 107, 108, 140, 156, 283, 2, 0, 999]) == (
        "<bos> 9 + = : +0 *0 0.0 7.15 <eos> <pad> ?"
    )
    with pytest.raises(ValueError, match="max_number"):
        StyledCountdown(max_number=100)
