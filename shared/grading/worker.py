"""A process that compares math answers for `MathGrader`: one JSON line in, one out. Runs as `python -m`.

Special: the kernel ends it when one comparison has used up its CPU seconds (SIGPROF), so neither a loop in C nor a dead
parent can keep it alive, and a busy machine changes no verdict. It ends when its standard input closes.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from contextlib import suppress

from shared.grading.compare import equal
from shared.grading.rules import CORRECT, HARNESS_ERROR, UNREADABLE, WRONG

MEMORY_BYTES = 4 << 30


def decide(gold: str, answer: str, science: bool) -> str:
    """CORRECT, WRONG or UNREADABLE for cleaned texts. May run for ever: call it where a time limit holds."""
    from shared.grading.verify import readable, same

    seen: list[str] = []

    def slow(one_gold: str, one_answer: str) -> bool:
        seen.append(one_answer)
        return same(one_gold, one_answer)

    if equal(gold, answer, science=science, slow=slow):
        return CORRECT
    return WRONG if all(map(readable, seen)) else UNREADABLE


def serve(limit_s: float) -> None:
    """Answer requests until standard input closes."""
    # Parsers print warnings; standard output carries replies only.
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    import shared.grading.verify  # noqa: F401  # before the clock runs

    print(json.dumps(["ready", ""]), file=replies, flush=True)
    for line in sys.stdin:
        gold, answer, science = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        try:
            reply = [decide(gold, answer, science), ""]
        except Exception as error:
            reply = [HARNESS_ERROR, type(error).__name__]
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    serve(float(sys.argv[1]))
