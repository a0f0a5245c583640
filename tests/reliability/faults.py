"""Accidents at any system call that changes files: SIGKILL before, after or in the middle of it, or a full disk.

with Faults(root) as counted: train()                       # counted.events: how many calls touched files below root
with Faults(root, kill_at=7, how="torn"): train()           # half of the 7th write reaches the file, then SIGKILL
with Faults(root, full_from=7): train()                     # from the 7th call on, nothing more fits on the disk

Special: it hooks Python's own doors to the system (`open`, the functions of `os`), so a write is torn where the library
under test made it, and it needs no tracer and no privileges. What C++ writes on its own would escape; ours does not.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

How = Literal["before", "after", "torn"]
NEEDS_SPACE = {"open", "create", "mkdir", "write", "flush", "fsync", "pwrite"}


class Faults:
    """Counts events below `root`, and strikes at the one of the given number (from 0)."""

    def __init__(
        self, root: Path | str, kill_at: int | None = None, how: How = "before", full_from: int | None = None
    ) -> None:
        self.root = str(Path(root).resolve())
        self.kill_at, self.how, self.full_from = kill_at, how, full_from
        self.events = 0
        self.log: list[str] = []
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Faults:
        real_open, real_fdopen = builtins.open, os.fdopen

        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if isinstance(file, int) or not set(mode) & set("wax+") or not self._ours(file):
                return real_open(file, mode, *args, **kwargs)
            return File(self.strike("open", file, lambda: real_open(file, mode, *args, **kwargs)), self)

        def fdopened(fd: int, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            file = real_fdopen(fd, mode, *args, **kwargs)
            return File(file, self) if set(mode) & set("wax+") and self._ours(fd) else file

        for module, name, new in ((builtins, "open", opened), (io, "open", opened), (os, "fdopen", fdopened)):
            self._patch(module, name, new)
        for name in ("fsync", "replace", "rename", "unlink", "remove", "mkdir", "rmdir", "pwrite", "ftruncate"):
            self._patch(os, name, self._hooked(name, getattr(os, name)))
        self._patch(os, "open", self._hooked_open(os.open))
        return self

    def __exit__(self, *_: object) -> None:
        for undo in reversed(self._undo):
            undo()
        self._undo = []

    def _patch(self, module: Any, name: str, new: Any) -> None:
        old = getattr(module, name)
        self._undo.append(lambda: setattr(module, name, old))
        setattr(module, name, new)

    def _hooked(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            if not self._ours(path, kwargs.get("dir_fd")):
                return real(path, *args, **kwargs)
            return self.strike(name, path, lambda: real(path, *args, **kwargs))

        return call

    def _hooked_open(self, real: Callable[..., int]) -> Callable[..., int]:
        def call(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            if not flags & os.O_CREAT or not self._ours(path, kwargs.get("dir_fd")):
                return real(path, flags, *args, **kwargs)
            return self.strike("create", path, lambda: real(path, flags, *args, **kwargs))

        return call

    def _ours(self, path: Any, dir_fd: int | None = None) -> bool:
        if isinstance(path, int):
            place = _of_descriptor(path)
        elif dir_fd is not None and not os.path.isabs(path):
            place = os.path.join(_of_descriptor(dir_fd), os.fspath(path))
        else:
            place = os.path.abspath(os.fspath(path))
        return isinstance(place, str) and place.startswith(self.root + os.sep)

    def strike(self, name: str, where: Any, act: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        """Do `act`, unless this is the event to strike at; `half` does a part of it."""
        number, self.events = self.events, self.events + 1
        self.log.append(f"{name} {where}")
        if self.full_from is not None and number >= self.full_from and name in NEEDS_SPACE:
            if half is not None:
                half()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if number != self.kill_at:
            return act()
        if self.how == "after":
            act()
        elif self.how == "torn" and half is not None:
            half()
        os.kill(os.getpid(), signal.SIGKILL)


class File:
    """A file opened for writing, whose writes and flushes are events."""

    def __init__(self, file: Any, faults: Faults) -> None:
        self._file, self._faults = file, faults

    def write(self, data: Any) -> int:
        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        return self._faults.strike("write", self._file.name, lambda: self._file.write(data), half)

    def flush(self) -> None:
        self._faults.strike("flush", self._file.name, self._file.flush)

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _of_descriptor(descriptor: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""
