r"""Grades of math answers: one at a time, or in batches by worker processes with a time limit.

    with MathGrader(workers=4) as grader:
        grades = grader.grade(golds, responses, RULES["math500"])    # in the order of the responses

Special: our rules decide what they can (an integer, a fraction, equal text) in the calling process, and equal questions
are asked once; math-verify sees the rest, in workers that start at the first such answer. An answer that hangs costs
its own time limit and a new worker, no other answer waits for it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path

from shared.experiment.contracts import AssayError
from shared.grading.rules import (
    CORRECT,
    HARNESS_ERROR,
    TIMEOUT,
    Grade,
    GradingNotInstalled,
    Pending,
    Rule,
    check_gold,
    pending_or_grade,
)
from shared.grading.worker import decide

ROOT = Path(__file__).resolve().parents[2]
_NO_VERDICT = (TIMEOUT, HARNESS_ERROR)
_PATIENCE = 10  # wall seconds per CPU second of the limit, before a worker that does not answer is killed


class GraderFailed(AssayError):
    """No worker could be started."""


def grade(gold: str, response: str, rule: Rule) -> Grade:
    """Grade one response in this process, without any time limit: for trusted text. Models' text: `MathGrader`.

    Raises `UnparsableGold`, and `GradingNotInstalled` where math-verify is needed and missing.
    """
    found = pending_or_grade(gold, response, rule)
    if isinstance(found, Grade):
        return found
    reason = decide(found.gold, found.answer, found.science)
    return Grade(reason == CORRECT, found.extracted, reason)


class MathGrader:
    """Grades batches of responses. Use it as a context manager, or call `close`; one thread at a time.

    `timeout_s` is CPU time of one comparison. Workers start when first needed, 0.6 CPU-seconds each, and stay.
    `failures` counts the grades without a verdict by reason, over the life of the grader.
    """

    def __init__(self, workers: int = 2, timeout_s: float = 5.0) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise GradingNotInstalled()
        if workers < 1 or timeout_s <= 0:
            raise ValueError(f"MathGrader needs workers >= 1 and timeout_s > 0, not {workers} and {timeout_s}")
        self.timeout_s = timeout_s
        self.failures: Counter[str] = Counter()
        self._workers: list[_Worker] = []
        self._most = workers

    def __enter__(self) -> MathGrader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers. The grader can be used again; it then starts new ones."""
        while self._workers:
            self._workers.pop().end()

    def grade(self, golds: Sequence[str], responses: Sequence[str], rule: Rule) -> list[Grade]:
        """Grades in the order of the responses, one gold for each.

        Raises `UnparsableGold` before any work is done, and `GraderFailed` if workers do not start.
        """
        if len(golds) != len(responses):
            raise ValueError(f"{len(golds)} golds for {len(responses)} responses")
        for gold in dict.fromkeys(golds):
            check_gold(gold, rule)
        found = [pending_or_grade(gold, response, rule) for gold, response in zip(golds, responses, strict=True)]
        questions = list(dict.fromkeys(item for item in found if isinstance(item, Pending)))
        answers = dict(zip(questions, self._ask(questions), strict=True))
        grades = [item if isinstance(item, Grade) else answers[item] for item in found]
        self.failures.update(grade.reason for grade in grades if grade.reason in _NO_VERDICT)
        return grades

    def _ask(self, questions: Sequence[Pending]) -> list[Grade]:
        """Hand each question to a free worker; a question whose worker died for no known reason gets a second one."""
        replies: dict[int, tuple[str, str]] = {}
        waiting = deque(range(len(questions)))
        deaths: Counter[int] = Counter()
        try:
            while len(replies) < len(questions):
                self._hand_out(questions, waiting)
                for worker in self._wait():
                    number, reply = worker.question, worker.reply(self.timeout_s)
                    if reply is None:
                        continue
                    if reply[0] == "died":
                        self._workers.remove(worker)
                        deaths[number] += 1
                        reply = (HARNESS_ERROR, reply[1])
                        if deaths[number] < 2:
                            waiting.appendleft(number)
                            continue
                    elif reply[0] == TIMEOUT:
                        self._workers.remove(worker)
                    replies[number] = reply
        except BaseException:
            self.close()  # replies that nobody waits for would be taken for the next batch's
            raise
        return [_grade(item, *replies[number]) for number, item in enumerate(questions)]

    def _hand_out(self, questions: Sequence[Pending], waiting: deque[int]) -> None:
        while waiting:
            worker = next((worker for worker in self._workers if worker.question < 0), None)
            if worker is None:
                if len(self._workers) == self._most:
                    return
                worker = _Worker(self.timeout_s)
                self._workers.append(worker)
            number = waiting.popleft()
            worker.ask(number, questions[number])

    def _wait(self) -> list[_Worker]:
        busy = [worker for worker in self._workers if worker.question >= 0]
        ready = wait([worker.output.fileno() for worker in busy], timeout=1.0)
        return [worker for worker in busy if worker.output.fileno() in ready or worker.overdue()]


def _grade(item: Pending, reason: str, detail: str) -> Grade:
    return Grade(None if reason in _NO_VERDICT else reason == CORRECT, item.extracted, reason, detail)


class _Worker:
    """One process; `question` is the number of the question it works on, -1 when it is free."""

    def __init__(self, limit_s: float) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "shared.grading.worker", repr(limit_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.input, self.output = self.process.stdin, self.process.stdout
        self.question = -1
        self.ready = False
        self.deadline = 0.0
        self.heard = b""

    def ask(self, number: int, item: Pending) -> None:
        self.question = number
        self.deadline = time.monotonic() + _PATIENCE * (float(self.process.args[-1]) + 1)  # type: ignore[index]
        with suppress(BrokenPipeError):  # `reply` finds out why
            self.input.write(json.dumps([item.gold, item.answer, item.science]).encode() + b"\n")
            self.input.flush()

    def overdue(self) -> bool:
        return time.monotonic() > self.deadline

    def reply(self, limit_s: float) -> tuple[str, str] | None:
        """(reason, detail) of the question; ("died", how) if the process ended; None if it is only ready."""
        if self.overdue():
            self.end()
            return TIMEOUT, "no reply"
        chunk = os.read(self.output.fileno(), 1 << 16)
        self.heard += chunk
        if not chunk:
            return self._ended(limit_s)
        *lines, self.heard = self.heard.split(b"\n")
        for reason, detail in map(json.loads, lines):
            if reason == "ready":
                self.ready = True
                continue
            self.question = -1
            return reason, detail
        return None

    def _ended(self, limit_s: float) -> tuple[str, str]:
        self.end()
        code = self.process.returncode
        if code == -signal.SIGPROF:
            return TIMEOUT, f"more than {limit_s:g} CPU-seconds"
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"code {code}"
        if not self.ready:
            raise GraderFailed(
                f"A grading worker ended with {how} before it was ready: run "
                f"`{sys.executable} -m shared.grading.worker 5` in {ROOT} to see why."
            )
        return "died", f"the worker ended with {how}"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        with suppress(BrokenPipeError):  # what the process never read
            self.input.close()
        self.output.close()
