"""Small file tools under every record: plain JSON of a config, hashes, atomic writes, locks between processes.

Standard library only.
"""

from __future__ import annotations

import dataclasses
import enum
import fcntl
import hashlib
import json
import math
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from shared.experiment.contracts import AssayError

HASH_LENGTH = 16
TEMPORARY = ".tmp"


class ConfigError(AssayError):
    """A config holds something that cannot be printed into a record."""


class RunBusy(AssayError):
    """Another process works on this folder."""


class Unwritable(AssayError):
    """A folder that the program must write to refuses, or its disk is full. What was written before is intact."""


def added(default: Any) -> Any:
    """A dataclass field that came after records were made without it.

    A record prints it like any other; the hash leaves it out while it has its default, so that older records of the
    same run stay valid.
    """
    return dataclasses.field(default=default, metadata={"added": True})


def plain(value: Any, where: str = "config", *, hashed: bool = False) -> Any:
    """JSON value of a config; a dataclass becomes a dict with its class name under `__type__`.

    `hashed` leaves `added` fields out that have their default.

    Raises `ConfigError` for functions, tensors and other things whose printed form would not say what they are.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        shown = [f for f in dataclasses.fields(value) if not (hashed and _left_out(f, getattr(value, f.name)))]
        fields = {f.name: plain(getattr(value, f.name), f"{where}.{f.name}", hashed=hashed) for f in shown}
        return {"__type__": type(value).__name__, **fields}
    if isinstance(value, enum.Enum):
        return plain(value.value, where)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}.{key}", hashed=hashed) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{i}]", hashed=hashed) for i, item in enumerate(value)]
    if isinstance(value, set | frozenset):
        return sorted(plain(item, where, hashed=hashed) for item in value)
    if isinstance(value, Path):
        return str(value)
    to_python: Any = getattr(value, "item", None)
    if callable(to_python) and getattr(value, "ndim", None) == 0:
        return plain(to_python(), where)  # scalars of numpy and torch
    raise ConfigError(
        f"{where} is a {type(value).__name__}, which no record can print: name it by a string or a number."
    )


def _left_out(field: dataclasses.Field[Any], value: Any) -> bool:
    return bool(field.metadata.get("added")) and value == field.default


def digest(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of a plain value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_LENGTH]


def config_hash(config: Any) -> str:
    """Hash of a config as it is printed into `config.json`, `added` fields at their defaults aside."""
    return digest(plain(config, hashed=True))


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def writing(path: Path, kind: type[Unwritable] = Unwritable) -> Iterator[None]:
    """Turn what the system answers while `path` is written into one sentence: raises `kind` for `OSError`."""
    try:
        yield
    except OSError as error:
        raise kind(
            f"Cannot write {path} ({error.strerror}): free space or make the folder writable, then start again; "
            "what was saved before is intact."
        ) from error


def write_atomic(path: Path, content: str | bytes | memoryview, kind: type[Unwritable] = Unwritable) -> None:
    """Replace `path` in one step: a reader sees the old file or the new one, also after a power cut.

    Raises `kind`, an `Unwritable`; the old file stays then. A killed writer leaves `.<name>.<random>.tmp` behind, see
    `remove_leftovers`.
    """
    path = Path(path)
    with writing(path, kind):
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Delete what killed `write_atomic`s left in `folder` and below. For the one who holds the lock of the folder."""
    for path in folder.rglob(f".*{TEMPORARY}"):
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def move_aside(path: Path, why: str) -> Path:
    """Rename `path` to `<path>.<why>-<first free number>` and return the new place. Nothing is deleted."""
    number = 1
    while (target := path.with_name(f"{path.name}.{why}-{number}")).exists():
        number += 1
    path.rename(target)
    return target


def ensure_writable(folder: Path) -> Path:
    """Create `folder` and prove that files can be written there, or raise `Unwritable`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise Unwritable(
            f"Cannot write to {folder} ({error.strerror}): free space, choose another folder or make this one writable."
        ) from error
    return folder


class FileLock:
    """flock on a file that also tells who holds it. It goes with the process, however that ends.

    A forked child does not keep it: a writer that outlives its killed parent must not block the next start.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._descriptor: int | None = None

    def acquire(self, wait: bool = False) -> bool:
        """True once the lock is ours; False if another process has it and `wait` is off. Raises `Unwritable`."""
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()} on {platform.node()}".encode(), 0)
            except BlockingIOError:
                os.close(descriptor)
                return False
            except BaseException:
                os.close(descriptor)
                raise
        self._descriptor = descriptor
        _held.add(self)
        return True

    def holder(self) -> str:
        """The last holder as text: process id, and its machine, which on a cluster may be another one."""
        try:
            return self.path.read_text() or "unknown"
        except OSError:
            return "unknown"

    def release(self) -> None:
        _held.discard(self)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


_held: set[FileLock] = set()


def _release_in_child() -> None:
    # Closing a copy of the descriptor leaves the parent's lock alone.
    for lock in list(_held):
        with suppress(OSError):
            lock.release()


os.register_at_fork(after_in_child=_release_in_child)
