"""Generated tasks with exact verifiers, by name: `get_task("styled_countdown", numbers=(3,))`. No torch."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

from shared.experiment.contracts import AssayError

if TYPE_CHECKING:
    from shared.data.tasks.base import Task

TASKS = {
    "plain_countdown": ("countdown", "PlainCountdown"),
    "styled_countdown": ("countdown", "StyledCountdown"),
    "modular": ("modular", "ChainedModular"),
    "multiplication": ("multiplication", "ScratchpadMultiplication"),
}
"""name -> (module, class)"""


class UnknownTask(AssayError):
    """No task has this name."""


def get_task(name: str, **difficulty: Any) -> Task:
    """The task of that name; `difficulty` sets fields of its dataclass. Raises `UnknownTask` with the closest name."""
    if name not in TASKS:
        close = get_close_matches(name, TASKS, n=1, cutoff=0.0)[0]
        raise UnknownTask(f"Unknown task {name!r}: did you mean {close!r}? Tasks: {', '.join(TASKS)}.")
    module, cls = TASKS[name]
    return getattr(import_module(f"shared.data.tasks.{module}"), cls)(**difficulty)
