"""Shared products, built once per content address and checked each time they are used.

Special: a build that was interrupted goes on in the same `<address>.partial` folder; a finished one is renamed into
place with a manifest of checksums. Two processes that need the same artifact build it once: the second waits.
The address covers name, config and all code that `build` can reach. A builder may keep its own record in `run/`,
which holds clocks and is not part of the content.

Cache: $ASSAY_CACHE/artifacts, else $XDG_CACHE_HOME/assay/artifacts, else ~/.cache/assay/artifacts.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.experiment.codehash import function_hash
from shared.experiment.contracts import Artifact, AssayError, Interrupted
from shared.experiment.files import (
    FileLock,
    digest,
    ensure_writable,
    move_aside,
    plain,
    remove_leftovers,
    sha256_file,
    sync_folder,
    write_json,
    writing,
)
from shared.experiment.overrides import replace_fields
from shared.experiment.signals import stop_requested

MANIFEST = "manifest.json"
ADDRESS_LENGTH = 12


class ArtifactDamaged(AssayError):
    """A file of a built artifact was cut short or edited."""


class ArtifactEmpty(AssayError):
    """A builder wrote no files."""


@dataclass(frozen=True)
class Built:
    """A verified artifact: its folder, its address and the hash of its files."""

    path: Path
    address: str
    content: str


def cache_root() -> Path:
    """Folder that holds all artifacts of this user."""
    if chosen := os.environ.get("ASSAY_CACHE"):
        return Path(chosen) / "artifacts"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "assay" / "artifacts"


def config_at(artifact: Artifact, scale: str) -> Any:
    """Config of the artifact at a scale."""
    return replace_fields(artifact.config, artifact.overrides.get(scale, {}))


def address(artifact: Artifact, scale: str) -> str:
    """`<name>-<12 hex digits>` over name, config at this scale, and code."""
    identity = [artifact.name, plain(config_at(artifact, scale), hashed=True), function_hash(artifact.build)]
    return f"{artifact.name}-{digest(identity)[:ADDRESS_LENGTH]}"


def find(place: str) -> Built | None:
    """The artifact of that address, verified; None if it was not built. Raises `ArtifactDamaged` by file name."""
    path = cache_root() / place
    if not path.exists():
        return None
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files, content = manifest["files"], manifest["content"]
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactDamaged(f"{path / MANIFEST} cannot be read ({error}).") from error
    for name, expected in files.items():
        if not (path / name).exists() or sha256_file(path / name) != expected:
            raise ArtifactDamaged(f"{path / name} does not match its checksum.")
    return Built(path, place, content)


def build(artifact: Artifact, scale: str, say: Callable[[str], None] = print) -> Built:
    """Return the artifact, building it first if need be; `say` hears of waiting and of damage.

    Raises `Interrupted` when asked to stop; what was built so far stays for the next attempt.
    """
    place = address(artifact, scale)
    root = ensure_writable(cache_root())
    lock = FileLock(root / f".{place}.lock")
    _wait_for(lock, place, say)
    try:
        try:
            found = find(place)
        except ArtifactDamaged as damage:
            say(f"{damage} Moved aside to {move_aside(root / place, 'damaged')}, building it again.")
            found = None
        if found is None:
            _build(artifact, scale, root / place)
            found = find(place)
        if found is None:
            raise ArtifactDamaged(f"{root / place} vanished while it was being checked: run again.")
        return found
    finally:
        lock.release()


def _wait_for(lock: FileLock, place: str, say: Callable[[str], None]) -> None:
    waiting = False
    while not lock.acquire():
        if not waiting:
            say(f"Waiting for process {lock.holder()}, which builds {place}.")
            waiting = True
        if stop_requested():
            raise Interrupted(f"Stopped while waiting for {place}.")
        time.sleep(0.1)


def _build(artifact: Artifact, scale: str, target: Path) -> None:
    partial = target.with_name(f"{target.name}.partial")
    with writing(partial):
        partial.mkdir(exist_ok=True)
    remove_leftovers(partial)
    config = config_at(artifact, scale)
    artifact.build(config, partial)
    files = {str(path.relative_to(partial)): sha256_file(path) for path in sorted(partial.rglob("*")) if path.is_file()}
    files = {name: checksum for name, checksum in files.items() if not name.startswith((".", "run/", MANIFEST))}
    if not files:
        raise ArtifactEmpty(f"Building {artifact.name} wrote no files into {partial}: correct its `build`.")
    manifest = {"name": artifact.name, "scale": scale, "config": plain(config)}
    write_json(partial / MANIFEST, {**manifest, "files": files, "content": digest(files)})
    with writing(target):
        os.replace(partial, target)
        sync_folder(target.parent)
