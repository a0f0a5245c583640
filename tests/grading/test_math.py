"""The batch grader: verdicts of the plain function, order, time limits, deaths, and nothing left behind."""

import os
import signal
import sys
import threading
import time
from unittest.mock import Mock

import psutil
import pytest

from shared.grading import math as grading
from shared.grading.math import GraderFailed, MathGrader, grade
from shared.grading.rules import (
    CORRECT,
    HARNESS_ERROR,
    MATH,
    TIMEOUT,
    UNREADABLE,
    WRONG,
    GradingNotInstalled,
    UnparsableGold,
)

pytest.importorskip("math_verify")

MONSTER = r"\boxed{9^{9^{9}}}"
SLOW = [  # only math-verify can tell
    ("p - q", r"\boxed{-q + p}", CORRECT),
    ("p - q", r"\boxed{q - p}", WRONG),
    (r"\sqrt{2}", r"\boxed{2^{1/2}}", CORRECT),
    ("2k+2", r"\boxed{2(k+1)}", CORRECT),
    ("x^3+3x-6", r"\boxed{x^3-3x-6}", WRONG),
]
QUICK = [("42", r"\boxed{42}", CORRECT), ("42", r"\boxed{41}", WRONG), (r"\frac{1}{2}", r"\boxed{0.5}", CORRECT)]


def columns(pairs):
    return [gold for gold, *_ in pairs], [text for _, text, *_ in pairs]


@pytest.fixture(scope="module")
def grader():
    with MathGrader(workers=2, timeout_s=1.0) as grader:
        yield grader


def test_grades_are_those_of_the_plain_function_in_the_order_asked(grader):
    pairs = (SLOW + QUICK) * 7
    grades = grader.grade(*columns(pairs), MATH)
    assert [item.reason for item in grades] == [reason for *_, reason in pairs]
    assert grades[: len(SLOW)] == [grade(gold, text, MATH) for gold, text, _ in SLOW]


def test_one_that_hangs_costs_its_time_once_and_no_other_waits(grader):
    grader.grade(*columns(SLOW), MATH)
    pairs = [("42", MONSTER)] * 3 + SLOW * 3
    start = time.monotonic()
    grades = grader.grade(*columns(pairs), MATH)
    assert [item.reason for item in grades] == [TIMEOUT] * 3 + [reason for *_, reason in SLOW] * 3
    assert (grades[0].correct, grades[0].detail) == (None, "more than 1 CPU-seconds")
    # One second for three equal questions, and slack for a machine with other work.
    assert time.monotonic() - start < 10
    assert grader.failures == {TIMEOUT: 3}
    assert grader.grade(*columns(SLOW), MATH)[0].reason == CORRECT


def test_quick_answers_start_no_process():
    with MathGrader() as grader:
        grader.grade(*columns(QUICK), MATH)
        assert not workers_of(grader)


def workers_of(grader):
    return [psutil.Process(worker.process.pid) for worker in grader._workers]


def kill_each_busy_worker(grader, stop):
    while not stop.is_set():
        for worker in grader._workers:
            if worker.ready and worker.process.poll() is None:
                worker.process.kill()
        time.sleep(0.01)


def test_a_worker_that_dies_is_replaced_and_its_question_asked_again():
    with MathGrader(workers=1, timeout_s=5.0) as grader:
        grader.grade(*columns(SLOW[:1]), MATH)
        (worker,) = workers_of(grader)
        worker.send_signal(signal.SIGKILL)
        grades = grader.grade(*columns(SLOW), MATH)
        assert [item.reason for item in grades] == [reason for *_, reason in SLOW]
        assert not grader.failures


def test_a_question_that_kills_two_workers_is_a_harness_error_and_names_the_cause():
    with MathGrader(workers=1, timeout_s=60.0) as grader:
        stop = threading.Event()
        killer = threading.Thread(target=kill_each_busy_worker, args=(grader, stop))
        killer.start()
        try:
            (monster,) = grader.grade(["42"], [MONSTER], MATH)
        finally:
            stop.set()
            killer.join()
    assert (monster.correct, monster.reason) == (None, HARNESS_ERROR)
    assert monster.detail == "the worker ended with signal SIGKILL"
    assert grader.failures == {HARNESS_ERROR: 1}


def test_a_worker_that_stops_answering_is_given_up(monkeypatch):
    with MathGrader(workers=1, timeout_s=1.0) as grader:
        grader.grade(*columns(SLOW[:1]), MATH)
        monkeypatch.setattr(grading, "_PATIENCE", 0.5)
        (worker,) = workers_of(grader)
        worker.send_signal(signal.SIGSTOP)
        (found,) = grader.grade(["p + r"], [r"\boxed{r + q}"], MATH)
    assert (found.reason, found.detail) == (TIMEOUT, "no reply")


def test_closing_or_vanishing_leaves_no_process_and_no_descriptor():
    before = set(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else set()
    with MathGrader(workers=2, timeout_s=1.0) as grader:
        grader.grade(*columns(SLOW), MATH)
        workers = workers_of(grader)
        assert len(workers) == 2
        grader._workers[0].input.close()  # what a worker sees of a parent that vanished
        workers[0].wait(timeout=20)
    assert not any(worker.is_running() for worker in workers)
    grader.close()
    assert before == (set(os.listdir("/proc/self/fd")) if before else set())


def test_an_interrupted_batch_ends_its_workers(monkeypatch):
    with MathGrader(workers=1, timeout_s=5.0) as grader:
        grader.grade(*columns(SLOW[:1]), MATH)
        with monkeypatch.context() as patch:
            patch.setattr(grading, "wait", Mock(side_effect=KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                grader.grade(["a + b"], [r"\boxed{c + a}"], MATH)
        assert not workers_of(grader)
        assert grader.grade(*columns(SLOW), MATH)[1].reason == WRONG


def test_workers_that_cannot_start_are_named(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with MathGrader(workers=1) as grader, pytest.raises(GraderFailed, match="ended with code 1 before it was ready"):
        grader.grade(*columns(SLOW), MATH)


def test_bad_input_is_refused_before_any_work(monkeypatch):
    with MathGrader(workers=1) as grader:
        with pytest.raises(UnparsableGold, match="is empty"):
            grader.grade(["p - q", ""], [r"\boxed{q - p}"] * 2, MATH)
        with pytest.raises(ValueError, match="2 golds for 1 responses"):
            grader.grade(["1", "2"], ["\\boxed{1}"], MATH)
        assert not workers_of(grader)
    with pytest.raises(ValueError, match="workers >= 1"):
        MathGrader(workers=0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(GradingNotInstalled, match=r"pip install 'assay\[eval\]'"):
        MathGrader()


HOSTILE = ["9^{9^{9^{9}}}", r"\frac{" * 30 + "1" + "}{2}" * 30, r"\sqrt{" * 31 + "x" + "}" * 31, "x^{99999999}-1"]
HOSTILE += [
    "\0",
    "\ud800",
    "\u202e42",
    "\U0001d7dc\U0001d7da",
    "1" * 1999,
    "e^{e^{e^{e^{79}}}}",
    r"\frac{1}{0}",
    "0/0",
    r"\log 0",
    r"\sqrt{-1}",
    "=",
    "==",
]
HOSTILE += [
    "x=",
    "%",
    "_",
    "^",
    "\\",
    r"\\",
    "{}",
    r"\frac",
    "()",
    "(,)",
    "[]",
    ",,",
    r"\pm",
    "a" * 500,
    "x+" * 200 + "x",
    "\n\n",
]
HOSTILE += [
    r"\begin{pmatrix}" + "1&" * 200 + r"1\end{pmatrix}",
    r"\lim_{x\to 0}\frac{\sin x}{x}",
    "__import__('os')",
    "lambda: 0",
]


def test_hostile_answers_end_in_a_grade_and_are_never_correct():
    with MathGrader(workers=2, timeout_s=0.4) as grader:
        grades = grader.grade(["x^2+1"] * len(HOSTILE), [f"\\boxed{{{text}}}" for text in HOSTILE], MATH)
    assert not [text for text, item in zip(HOSTILE, grades, strict=True) if item.correct]
    assert {item.reason for item in grades} >= {TIMEOUT, WRONG, UNREADABLE}
    assert HARNESS_ERROR not in {item.reason for item in grades}
