"""Modular chains and scratchpad multiplication against Python's own arithmetic."""

import re

import numpy as np
import pytest

from shared.data.tasks import base, get_task
from shared.data.tasks.base import Problem
from shared.data.tasks.characters import encode
from shared.data.tasks.modular import ModularProblem

MODULAR = get_task("modular")
MULTIPLICATION = get_task("multiplication")
CHAIN = ModularProblem((3, 5, 2, 4), 5, "+*-")
PRODUCT = Problem((47, 36), 1692)


def test_modular_target_is_the_left_to_right_value():
    for problem in MODULAR.problems("rl", 500, seed=0):
        nested = str(problem.numbers[0])
        for op, number in zip(problem.operators, problem.numbers[1:], strict=True):
            nested = f"(({nested}){op}{number})"
        assert problem.target == eval(nested) % 7


def test_multiplication_ends_with_the_product():
    task = get_task("multiplication", digits=5)
    for problem in task.problems("rl", 300, seed=0):
        text = task.render(task.derivation(problem, None))
        assert all(eval(step.replace("=", "==")) for step in text[:-1].split(";"))
        assert int(re.findall(r"\d+", text)[-1]) == problem.numbers[0] * problem.numbers[1] == problem.target


def test_worked_examples():
    assert MODULAR.render(MODULAR.prompt(CHAIN)) == "^3+5*2-4,7:"
    assert MODULAR.render(MODULAR.derivation(CHAIN, None)) == "3+5=1;1*2=2;2-4=5$"
    assert MULTIPLICATION.render(MULTIPLICATION.prompt(PRODUCT)) == "^47*36:"
    assert MULTIPLICATION.render(MULTIPLICATION.derivation(PRODUCT, None)) == "47*6=282;47*3=141;282+1410=1692$"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("3+5=1;1*2=2;2-4=5$", base.OK),
        ("3+5=1;1*2=2;2-4=5", base.NO_EOS),
        ("3+5=1; 1*2=2;2-4=5$", base.FORMAT),
        ("3+5=1;1*2=2$", base.STEPS),
        ("5+3=1;1*2=2;2-4=5$", base.OPERAND),
        ("3*5=1;1*2=2;2-4=5$", base.OPERATOR),
        ("3+5=8;1*2=2;2-4=5$", base.ARITHMETIC),
        ("3+5=1;1*2=2;2-4=6$", base.ARITHMETIC),
    ],
)
def test_modular_reason_codes(text, reason):
    assert MODULAR.verify(CHAIN, encode(text)).reason == reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("47*6=282;47*3=141;282+1410=1692$", base.OK),
        ("47*6=282;47*3=141;282+1410=1692", base.NO_EOS),
        ("47*6=282;47*3=141;282+1410=1692$_", base.NO_EOS),
        ("47*6=282;47*3=141;282+1410=$", base.FORMAT),
        ("47*36=1692$", base.STEPS),
        ("47*3=141;47*6=282;141+2820=2961$", base.OPERAND),
        ("47*6=282;47+3=50;282+1410=1692$", base.OPERATOR),
        ("47*6=282;47*3=141;282+1410=1693$", base.ARITHMETIC),
    ],
)
def test_multiplication_reason_codes(text, reason):
    assert MULTIPLICATION.verify(PRODUCT, encode(text)).reason == reason


@pytest.mark.parametrize("task", [MODULAR, MULTIPLICATION], ids=lambda task: task.name)
def test_any_changed_symbol_is_wrong(task):
    for problem in task.problems("sft", 20, seed=0):
        right = task.derivation(problem, np.random.default_rng(0))
        for i in range(len(right)):
            for token in range(task.vocab_size):
                if token != right[i]:
                    assert not task.verify(problem, [*right[:i], token, *right[i + 1 :]]).correct
