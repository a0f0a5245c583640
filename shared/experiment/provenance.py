"""Where a number came from: commit, code, packages, machine. Collected once per launch, written into each record."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "megatron-core", "numpy", "transformers", "safetensors", "scipy", "sentencepiece", "tyro")
# What a committed number depends on; an edited README or table does not make a record dirty.
CODE_PATHS = ("papers", "shared", "eval", "pyproject.toml")

ENVIRONMENT = ("artifacts", "data", "packages", "python", "platform", "device", "threads", "layout")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def code_is_dirty() -> bool:
    """True if code differs from the commit. Markdown files are prose; without git nothing can be vouched for."""
    changed = _git("status", "--porcelain", "--untracked-files=all", "--", *CODE_PATHS)
    if changed is None:
        return True
    return any(not line.endswith((".md", ".svg", ".png")) for line in changed.splitlines())


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


def collect(code_hash: str = "", claims_hash: str = "", data: dict[str, str] | None = None) -> dict[str, Any]:
    """Provenance of runs started now. `artifacts` and `device` are filled in by the process that runs.

    `layout` is that of one process; the launcher puts the layout of a run that it spreads in its place.
    """
    return {
        "commit": _git("rev-parse", "HEAD") or "none",
        "dirty": code_is_dirty(),
        "code_hash": code_hash,
        "claims_hash": claims_hash,
        "artifacts": {},
        "data": data or {},
        "packages": _versions(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": "cpu",
        "layout": "1",
        "threads": int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1),
    }


def device_name() -> str:
    """The GPU that PyTorch sees, or "cpu". Asks only a torch that is loaded already."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "cpu"


def go_on_from(before: Mapping[str, Any], provenance: dict[str, Any]) -> None:
    """Make `provenance` that of a resumed record.

    It began at the older commit and is as clean as its dirtiest part. Where the environment changed in between, what
    the earlier attempts ran on stays in the list `earlier`.
    """
    provenance.update(commit=before["commit"], claims_hash=before["claims_hash"])
    provenance["dirty"] = bool(provenance["dirty"] or before["dirty"])
    changed = {name: before[name] for name in ENVIRONMENT if name in before and before[name] != provenance.get(name)}
    if changed:
        _log.warning("The run goes on with other %s than it began with: its provenance keeps both.", ", ".join(changed))
    if earlier := [*before.get("earlier", []), *([changed] if changed else [])]:
        provenance["earlier"] = earlier
