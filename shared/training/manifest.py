"""What a distributed checkpoint says about itself, and how it is checked before anything is loaded. No torch.

    <run>/checkpoints/step-00000012-9f2c51d07a4be803/
        manifest.json     format version, step, what made it, and length and SHA-256 of every other file; written last
        __0_0.distcp ...  tensors, in Megatron's torch_dist format (one file per rank)
        .metadata, metadata.json, common.pt

The name ends with the first 16 hex digits of the manifest's SHA-256: folder, manifest and files vouch for each other,
and all of it comes into being in one rename. No clock is in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.experiment.contracts import AssayError
from shared.experiment.files import plain, sha256_file
from shared.megatron.config import ModelConfig
from shared.megatron.layout import Layout

MANIFEST = "manifest.json"
FORMAT = "assay-distributed-checkpoint"
VERSION = 1
_NAME = re.compile(r"step-(\d{8,})-([0-9a-f]{16})")


class UnusableCheckpoint(AssayError):
    """A checkpoint that cannot be loaded, for one of the reasons below. The message offers the last good one."""


class CheckpointDamaged(UnusableCheckpoint):
    """A file of it is missing, cut short or changed."""


class ForeignCheckpoint(UnusableCheckpoint):
    """A folder that this program did not write as a checkpoint."""


class OtherCheckpointFormat(UnusableCheckpoint):
    """Written by a version of this program that used another format."""


class CheckpointMismatch(UnusableCheckpoint):
    """Made by another architecture, tokenizer, optimizer or precision than the one that wants to load it."""


@dataclass(frozen=True)
class Tokenizer:
    """Name of a tokenizer and SHA-256 (hex) of the file that defines it."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Contents:
    """What made the tensors of a checkpoint, and where in the data it stands.

    layout: what it was written under; any other layout can load it.
    optimizer: the optimizer's config, a frozen dataclass.
    data: the config of the batches; `seed` and `consumed_samples` (sequences) are the position in them. Batches,
        initial weights and everything else random are functions of seed and step, so no generator has a state to keep.
    """

    model: ModelConfig
    layout: Layout
    optimizer: Any
    precision: str
    data: Any
    seed: int
    consumed_samples: int
    tokenizer: Tokenizer | None = None


@dataclass(frozen=True)
class Stored:
    """A checkpoint on disk whose manifest is intact. `manifest` is the parsed JSON."""

    path: Path
    step: int
    manifest: Mapping[str, Any]

    @property
    def metric(self) -> float | None:
        """The value that `keep_best` compares, lower is better; None where it was not measured."""
        return self.manifest["metric"]

    @property
    def layout(self) -> Layout:
        """The layout that it was written under."""
        fields = self.manifest["contents"]["layout"]
        return Layout(**{name: value for name, value in fields.items() if name != "__type__"})


def file_entry(path: Path) -> dict[str, Any]:
    """Length and checksum of one file, as the manifest lists it."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def write_manifest(
    folder: Path, step: int, contents: Contents, metric: float | None, files: Mapping[str, Mapping[str, Any]]
) -> str:
    """Write and sync `folder`/manifest.json; returns the name that the folder is to be renamed to."""
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "metric": metric,
        "contents": plain(contents),
        "files": {name: files[name] for name in sorted(files)},
    }
    data = (json.dumps(manifest, indent=1, allow_nan=False) + "\n").encode()
    with open(folder / MANIFEST, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return f"step-{step:08d}-{hashlib.sha256(data).hexdigest()[:16]}"


def read_stored(path: Path) -> Stored:
    """Read the manifest of a checkpoint and check it against the folder's name; the other files are not looked at.

    Raises `ForeignCheckpoint`, `OtherCheckpointFormat` or `CheckpointDamaged`.
    """
    path = Path(path)
    name = _NAME.fullmatch(path.name)
    if name is None or not path.is_dir():
        raise ForeignCheckpoint(f"{path} is not a checkpoint of this program (step-<step>-<checksum>).")
    try:
        data = (path / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise ForeignCheckpoint(f"{path} has no {MANIFEST}: it was not written by this program.") from None
    except OSError as error:
        raise CheckpointDamaged(f"{path / MANIFEST} cannot be read ({error.strerror}).") from error
    if hashlib.sha256(data).hexdigest()[:16] != name[2]:
        raise CheckpointDamaged(f"{path / MANIFEST} does not match the checksum in the folder's name.")
    manifest = json.loads(data)
    if manifest.get("format") != FORMAT:
        raise ForeignCheckpoint(f"{path / MANIFEST} does not describe a checkpoint of this program.")
    if manifest["version"] != VERSION:
        raise OtherCheckpointFormat(
            f"{path} has format version {manifest['version']} and this program reads version {VERSION}: "
            "use the program version that wrote it."
        )
    return Stored(path, int(name[1]), manifest)


def damaged_files(stored: Stored, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with every `parts`-th listed file from number `part` on; ranks share the reading that way."""
    wrong = []
    listed = list(stored.manifest["files"].items())
    for name, entry in listed[part::parts]:
        file = stored.path / name
        try:
            if file.stat().st_size != entry["bytes"]:
                wrong.append(f"{file} has {file.stat().st_size} bytes instead of {entry['bytes']}")
            elif sha256_file(file) != entry["sha256"]:
                wrong.append(f"{file} does not match its checksum")
        except FileNotFoundError:
            wrong.append(f"{file} is missing")
        except OSError as error:
            wrong.append(f"{file} cannot be read ({error.strerror})")
    return wrong


def refuse_mismatch(stored: Stored, **expected: Any) -> None:
    """Raise `CheckpointMismatch` naming every value in which the checkpoint was made by something else.

    `expected` gives fields of `Contents`, usually `model`, `tokenizer` and `precision`.
    """
    then = stored.manifest["contents"]
    differing = []
    for name, value in expected.items():
        now, without_defaults = plain(value), plain(value, hashed=True)
        if isinstance(now, Mapping) and isinstance(then[name], Mapping):
            # A field that came later is absent in an older manifest, where it stood for today's default.
            later = now.keys() - without_defaults.keys() - then[name].keys()
            now = {key: item for key, item in now.items() if key not in later}
        differing += _differences(then[name], now, name)
    if differing:
        raise CheckpointMismatch(f"{stored.path} was made by something else: {'; '.join(differing)}.")


def newest_first(stored: Sequence[Stored]) -> list[Stored]:
    """By step; of equal steps the one written last comes first."""
    return sorted(stored, key=lambda s: (s.step, s.path.stat().st_mtime_ns), reverse=True)


def _differences(then: Any, now: Any, name: str) -> list[str]:
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        keys = sorted(then.keys() | now.keys())
        return [found for key in keys for found in _differences(then.get(key), now.get(key), f"{name}.{key}")]
    return [] if then == now else [f"{name} is {then} there and {now} here"]
