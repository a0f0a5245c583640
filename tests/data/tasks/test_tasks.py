"""Properties that every generated task keeps: derivations verify, splits never meet, noise never raises."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data.tasks import TASKS, UnknownTask, base, get_task
from shared.data.tasks.base import TooFewProblems

DIFFICULTIES = [
    ("styled_countdown", {}),
    ("styled_countdown", {"numbers": (3, 4), "zipf_exponent": 0.0, "words_per_class": 4}),
    ("plain_countdown", {}),
    ("plain_countdown", {"numbers": (3, 4), "styles": ("ascending", "swapped", "spaced", "result_first")}),
    ("plain_countdown", {"numbers": (4,), "max_number": 11, "styles": ("spaced",)}),
    ("modular", {}),
    ("modular", {"length": 6, "modulus": 113}),
    ("multiplication", {}),
    ("multiplication", {"digits": 4}),
]


@pytest.fixture(params=DIFFICULTIES, ids=lambda p: f"{p[0]}-{len(p[1])}", scope="module")
def task(request):
    name, difficulty = request.param
    return get_task(name, **difficulty)


def test_derivations_verify_and_fit(task):
    rng = np.random.default_rng(1)
    for problem in task.problems("sft", 2000, seed=3):
        prompt, response = task.prompt(problem), task.derivation(problem, rng)
        assert task.verify(problem, response) == base.Verdict(True, base.OK)
        assert len(prompt) <= task.max_prompt_len
        assert len(response) <= task.max_response_len
        assert prompt[0] == task.bos_id
        assert response.index(task.eos_id) == len(response) - 1
        assert all(0 <= token < task.vocab_size for token in prompt + response)
        assert task.pad_id not in prompt + response


@settings(max_examples=40, deadline=None)
@given(
    digits=st.integers(1, 8),
    length=st.integers(1, 9),
    modulus=st.integers(2, 5000),
    max_number=st.integers(1, 99),
    count=st.integers(2, 4),
    seed=st.integers(0, 2**31),
)
def test_any_difficulty_verifies(digits, length, modulus, max_number, count, seed):
    for task in (
        get_task("multiplication", digits=digits),
        get_task("modular", length=length, modulus=modulus),
        get_task("plain_countdown", numbers=(count,), max_number=max_number if count < 4 else 9),
        get_task("styled_countdown", numbers=(count,), max_number=max_number if count < 4 else 9),
    ):
        rng = np.random.default_rng(seed)
        try:
            problems = task.problems("sft", 3, seed)
        except TooFewProblems:
            continue
        for problem in problems:
            response = task.derivation(problem, rng)
            assert task.verify(problem, response).correct
            assert len(response) <= task.max_response_len
            assert not task.verify(problem, response[:-1]).correct


def test_splits_are_disjoint_and_eval_has_no_duplicates(task):
    def key(problem):
        return (tuple(sorted(problem.numbers)), problem.target) if "countdown" in task.name else problem

    n_eval = 60
    held_out = {key(problem) for problem in task.problems("eval", n_eval, seed=0)}
    assert len(held_out) == n_eval
    rl = {key(problem) for problem in task.problems("rl", 3000, seed=0)}
    sft = {key(problem) for problem in task.problems("sft", 3000, seed=0)}
    assert not held_out & rl
    assert not held_out & sft
    assert not rl & sft


def test_problems_are_deterministic_and_prefix_stable(task):
    assert task.problems("rl", 300, seed=7) == task.problems("rl", 300, seed=7)
    assert task.problems("rl", 40, seed=7) == task.problems("rl", 300, seed=7)[:40]
    assert task.problems("rl", 300, seed=7) != task.problems("rl", 300, seed=8)
    problem = task.problems("rl", 1, seed=0)[0]
    drawn = [task.derivation(problem, np.random.default_rng(5)) for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_split_is_the_same_in_another_process():
    code = (
        "from shared.data.tasks import TASKS, get_task\n"
        "print([get_task(name).problems('eval', 5, 0) for name in TASKS])"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1] == f"{[get_task(name).problems('eval', 5, 0) for name in TASKS]}\n"


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_noise_never_raises_and_reasons_are_documented(data):
    name, difficulty = data.draw(st.sampled_from(DIFFICULTIES))
    task = get_task(name, **difficulty)
    problem = task.problems("eval", 1, seed=data.draw(st.integers(0, 3)))[0]
    ids = data.draw(st.lists(st.integers(-3, task.vocab_size + 5), max_size=60))
    if data.draw(st.booleans()):
        response = task.derivation(problem, np.random.default_rng(0))
        cut = data.draw(st.integers(0, len(response)))
        ids = response[:cut] + ids + response[cut:]
    verdict = task.verify(problem, ids)
    assert verdict.reason in task.reasons
    assert verdict.correct == (verdict.reason == base.OK)
    task.render(ids)


def test_endless_digits_are_a_format_error():
    for name in ("plain_countdown", "modular", "multiplication"):
        task = get_task(name)
        problem = task.problems("eval", 1, seed=0)[0]
        ids = [task.prompt(problem)[1]] * 6000 + task.derivation(problem, np.random.default_rng(0))
        assert task.verify(problem, ids).reason == base.FORMAT


def test_too_few_problems_is_named():
    with pytest.raises(TooFewProblems, match="'eval' holds only about"):
        get_task("multiplication", digits=1).problems("eval", 128, seed=0)


def test_unknown_task_suggests_the_closest():
    with pytest.raises(UnknownTask, match="did you mean 'modular'"):
        get_task("modulr")


def test_tasks_import_no_torch():
    code = (
        "import sys; from shared.data.tasks import get_task; get_task('styled_countdown'); get_task('modular');"
        "assert not {'torch', 'transformers', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
