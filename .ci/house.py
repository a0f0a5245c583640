"""House rules that no linter knows: sizes, machine paths, registries, stray data. Run as part of `nox -s lint`.

Looks at what git tracks or would add. Prints every violation as `path:line: what to do`, exits 1 if there is any.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE_LINES, FUNCTION_LINES = 400, 50
FILE_BYTES = PAPER_BYTES = 1 << 20
# Python files that may be longer than FILE_LINES: path -> reason.
LONG_FILES: dict[str, str] = {}
DATA_SUFFIXES = {".arrow", ".bin", ".ckpt", ".distcp", ".h5", ".npy", ".npz", ".parquet", ".pickle", ".pkl", ".pt"}
DATA_SUFFIXES |= {".pth", ".safetensors", ".tar", ".zip"}
HOMES = "home|Users|root|work|opt|tmp|mnt|scratch|workspace"
MACHINE_PATH = re.compile(rf"(?<![\w.~/)}}*-])/(?:{HOMES})(?:/\w|\b(?=[\s\"'`]))")
REGISTRY = re.compile(r"--(?:extra-)?index-url|--find-links|--trusted-host|https?://[^\s\"'`)>]*/simple\b")
PRIVATE_HOST = re.compile(r"https?://(?:10|192\.168|172\.(?:1[6-9]|2\d|3[01]))\.\d|\.(?:internal|corp|intranet)\b")
PUBLIC_INDEX = "noxfile.py"  # the one place that names an index: PyTorch's public one for CPU wheels


def candidates() -> list[Path]:
    """Files that git tracks or would add, relative to the root."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    return [Path(name) for name in sorted({*names} - {""}) if (ROOT / name).is_file()]


def code_size(path: Path, text: str) -> Iterator[str]:
    """Files over FILE_LINES and functions over FUNCTION_LINES (without decorators and docstring)."""
    lines = text.count("\n")
    if lines > FILE_LINES and str(path) not in LONG_FILES:
        yield f"{path}:1: {lines} lines, at most {FILE_LINES}; split it, or list it with a reason in LONG_FILES"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
            length = node.end_lineno - body[0].lineno + 1 if body else 0
            if length > FUNCTION_LINES:
                yield f"{path}:{node.lineno}: {node.name} has {length} lines, at most {FUNCTION_LINES}; split it"


def prose(path: Path, text: str) -> Iterator[str]:
    """Paths of one machine and names of package registries."""
    for number, line in enumerate(text.splitlines(), 1):
        if MACHINE_PATH.search(line):
            yield f"{path}:{number}: a path of one machine; make it relative, or take it from a variable"
        if PRIVATE_HOST.search(line) or (REGISTRY.search(line) and str(path) != PUBLIC_INDEX):
            yield f"{path}:{number}: names a package registry or a private host; leave that to pip's configuration"


def violations() -> Iterator[str]:
    """Every broken rule of every file."""
    per_paper: Counter[str] = Counter()
    for path in candidates():
        size = (ROOT / path).stat().st_size
        if size > FILE_BYTES:
            yield f"{path}: {size} bytes, at most {FILE_BYTES}"
        if path.parts[0] == "results" and len(path.parts) > 2:
            per_paper[path.parts[1]] += size
        if path.suffix in DATA_SUFFIXES:
            yield f"{path}: data and checkpoints are not committed; they belong in the cache or in runs/"
            continue
        try:
            text = (ROOT / path).read_text()
        except UnicodeDecodeError:
            continue
        if str(path) not in {"LICENSE", ".ci/house.py"}:
            yield from prose(path, text)
        if path.suffix == ".py":
            yield from code_size(path, text)
    for paper, size in per_paper.items():
        if size > PAPER_BYTES:
            yield f"results/{paper}: {size} bytes, at most {PAPER_BYTES}; promote fewer rows or smaller figures"


def main() -> None:
    found = list(violations())
    print("\n".join(found) or "House rules: all kept.")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
