"""Checkpoints that survive crashes: checksummed, renamed into place, the previous one kept.

    checkpoints = Checkpoints(run.checkpoints)
    step, state = resume(run, checkpoints)             # (0, None) to start from the beginning
    checkpoints.save(step, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})

A file is called `step-<step>-<first 16 hex digits of its SHA-256>.pt`: name and checksum come into being in one rename,
and `torch.load` reads the file without this module. `save_weights` and `load_weights` keep final weights as
safetensors with the checksum in the metadata.
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from shared.experiment.contracts import AssayError, RunContext
from shared.experiment.files import Unwritable, move_aside, write_atomic, writing

_log = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d+)-([0-9a-f]{16})\.pt")


class CheckpointNotWritten(Unwritable):
    """The folder cannot be written or the disk is full. Earlier checkpoints are intact."""


class WeightsDamaged(AssayError):
    """A weights file is missing, cut short, or does not match its checksum."""


class Checkpoints:
    """The newest `keep` states of one run, in `directory`. One writer at a time.

    `damaged` collects the files that `latest` found not to match their checksum; they are left in place.
    """

    def __init__(self, directory: Path | str, keep: int = 2) -> None:
        self.directory = Path(directory)
        self.keep = keep
        self.damaged: list[Path] = []

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write nested dicts and lists of tensors, numbers and strings; then drop all but the newest `keep` files.

        Raises `CheckpointNotWritten`; whatever was saved before stays.
        """
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        data = buffer.getbuffer()
        path = self.directory / f"step-{step:08d}-{hashlib.sha256(data).hexdigest()[:16]}.pt"
        with writing(self.directory, CheckpointNotWritten):
            self.directory.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data, CheckpointNotWritten)
        if path in self.damaged:
            self.damaged.remove(path)
        intact = [old for old in self._newest_first() if old not in self.damaged]
        for old in intact[self.keep :]:
            old.unlink(missing_ok=True)
        return path

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """Newest state whose checksum holds, tensors on the CPU. Damaged ones are named in a warning and skipped."""
        for path in self._newest_first():
            step, checksum = _parts(path)
            data = _bytes_or_nothing(path)
            if hashlib.sha256(data).hexdigest()[:16] == checksum:
                return step, torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            if path not in self.damaged:
                self.damaged.append(path)
                _log.warning("Checkpoint %s does not match its checksum: going back to the one before.", path)
        return None

    def set_aside_after(self, step: int) -> None:
        """Rename files of later steps to `<name>.no-rows-1`: they must neither be resumed nor push others out."""
        for path in self._newest_first():
            if _parts(path)[0] > step:
                _log.warning("Rows of checkpoint %s were lost: it becomes %s.", path, move_aside(path, "no-rows").name)

    def describe_latest(self) -> str:
        """Path of the newest checkpoint that is not known to be damaged, or "none": for error messages."""
        intact = [path for path in self._newest_first() if path not in self.damaged]
        return str(intact[0]) if intact else "none"

    def _newest_first(self) -> list[Path]:
        if not self.directory.is_dir():
            return []
        files = [path for path in self.directory.iterdir() if _NAME.fullmatch(path.name)]
        # Equal steps: the file written last wins.
        return sorted(files, key=lambda path: (_parts(path)[0], path.stat().st_mtime_ns), reverse=True)


def resume(run: RunContext, checkpoints: Checkpoints) -> tuple[int, dict[str, Any] | None]:
    """Step and state to go on from, (0, None) for the beginning; drops the rows from that step on.

    For loops that log one row per step, from step 0. A power cut may keep a checkpoint and lose rows, which are not
    flushed to disk one by one; a record with a gap would be silently wrong, so such a checkpoint is set aside.
    """
    checkpoints.set_aside_after(len(run.rows()))
    step, state = checkpoints.latest() or (0, None)
    run.rewind(step - 1)
    return step, state


def save_weights(path: Path | str, state: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, atomically, with a checksum of names, dtypes, shapes and values.

    Entries that are no tensors (Megatron's empty `_extra_state`) are left out. Raises `CheckpointNotWritten`.
    """
    tensors = {name: t.detach().cpu().contiguous() for name, t in state.items() if isinstance(t, Tensor)}
    content = safetensors_bytes(tensors, metadata={"sha256": _checksum(tensors)})
    write_atomic(Path(path), content, CheckpointNotWritten)


def load_weights(path: Path | str) -> dict[str, Tensor]:
    """Tensors of `save_weights`, on the CPU. Raises `WeightsDamaged`."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            checksum = (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError) as error:
        raise WeightsDamaged(f"{path} cannot be read ({error}): build it again.") from error
    if checksum != _checksum(tensors):
        raise WeightsDamaged(f"{path} does not match its checksum: build it again.")
    return tensors


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _parts(path: Path) -> tuple[int, str]:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1]), match[2]


def _bytes_or_nothing(path: Path) -> bytes:
    """An unreadable sector is damage like any other."""
    try:
        return path.read_bytes()
    except OSError as error:
        _log.warning("Checkpoint %s cannot be read (%s).", path, error.strerror)
        return b""
