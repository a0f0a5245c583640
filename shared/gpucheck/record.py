"""The result of a GPU check as a committed file, and the line that the board shows. Standard library only.

results/gpu-check/<gpu name>.json
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.experiment.contracts import AssayError
from shared.experiment.files import write_json

FIELDS = ("device", "gpus", "memory_gib", "cuda", "driver", "commit", "dirty", "packages", "python", "platform")
STATUSES = ("pass", "fail", "skipped")


class BadGPURecord(AssayError):
    """A file in results/gpu-check that no GPU check wrote."""


def path_of(device: str, root: Path) -> Path:
    """Where the result for a GPU of this name is committed."""
    return root / "results" / "gpu-check" / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def write(record: Mapping[str, Any], root: Path) -> Path:
    """Write the result of a real GPU in place of an older one. Raises `Unwritable`."""
    path = path_of(record["device"], root)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, dict(record))
    return path


def load_all(root: Path) -> list[dict[str, Any]]:
    """Every committed result, by file name. Raises `BadGPURecord`."""
    return [_load(path) for path in sorted((root / "results" / "gpu-check").glob("*.json"))]


def _load(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        missing = [name for name in (*FIELDS, "checks") if name not in record]
        wrong = [check["name"] for check in record.get("checks", ()) if check["status"] not in STATUSES]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadGPURecord(f"{path} is no result of a GPU check ({error}): restore it from git, or run it") from error
    if missing or wrong:
        raise BadGPURecord(f"{path} lacks {missing} or has no status for {wrong}: run `nox -s gpu-check` again")
    return record


def line(records: Sequence[Mapping[str, Any]], docs: str) -> str:
    """One Markdown sentence for the board; `docs` leads from its page to the folder docs."""
    said = "; ".join(_said(record) for record in records) or "never run"
    return f"GPU check: {said} ([what it checks]({docs}/gpu.md))."


def _said(record: Mapping[str, Any]) -> str:
    counts = Counter(check["status"] for check in record["checks"])
    failed = [check["name"] for check in record["checks"] if check["status"] == "fail"]
    names = f" ({', '.join(failed)})" if failed else ""
    changed = " with uncommitted changes" if record["dirty"] else ""
    return (
        f"{record['device']} at `{record['commit'][:7]}`{changed}: {counts['pass']} passed, "
        f"{counts['fail']} failed{names}, {counts['skipped']} skipped"
    )
