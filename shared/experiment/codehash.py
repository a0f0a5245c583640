"""Which code a number depends on, and a hash of it: decides whether a record may be reused or must be made again.

Syntax trees are read, nothing is executed. Comments, blank lines and docstrings do not count. Followed are all imports
inside `papers`, `shared` and `eval`, lazy ones too; a module that imports by computed name brings its whole folder in.
Not counted is what stores or judges numbers and makes none: CARDs, the record classes, and those parts of a paper's
`experiment.py` that its run function cannot reach. So a new arm, seed, claim or figure leaves older records valid; the
config of an arm has a hash of its own.

A hash holds for one Python minor version, because syntax trees differ between them.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import cache
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import Any

from shared.experiment.contracts import AssayError, Study
from shared.experiment.files import HASH_LENGTH, digest

OURS = ("papers", "shared", "eval")
RECORDING = {f"shared.experiment.{name}" for name in ("contracts", "files", "provenance", "records", "signals")}


class CodeUnknown(AssayError):
    """A function whose source cannot be found by name."""


def study_hash(paper: str, study: Study, addresses: Mapping[str, str]) -> str:
    """Hash of all code that a run of `study` can reach, and of the addresses of the artifacts it declared."""
    return run_hash(paper, study.run, {name: addresses[name] for name in study.artifacts})


def run_hash(paper: str, run: Callable[..., Any], addresses: Mapping[str, str]) -> str:
    """`study_hash` of the study with this run function, whose artifacts have these addresses and no others."""
    parts = _closure(_study_roots(paper, run))
    return digest([run.__module__, run.__qualname__, dict(addresses), sorted(parts.items())])


def function_hash(function: Callable[..., Any]) -> str:
    """Hash of all code that `function` can reach."""
    roots = _function_roots(function)
    return digest([function.__module__, function.__qualname__, sorted(_closure(roots).items())])


def reached_modules(paper: str, study: Study) -> tuple[str, ...]:
    """Names of the modules behind `study_hash`, sorted."""
    return tuple(sorted(_closure(_study_roots(paper, study.run))))


_Roots = dict[str, tuple[str, ...] | None]
"""Module -> the names wanted from it, or None for the whole module."""


def _function_roots(function: Callable[..., Any]) -> _Roots:
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "<")
    if module is None or "<" in name or locate(module) is None:
        raise CodeUnknown(f"{function!r} has no importable source: define it with `def` at the top of a module.")
    is_declaration = module.rpartition(".")[2] == "experiment"
    return {module: (name.partition(".")[0],) if is_declaration else None}


def _study_roots(paper: str, run: Callable[..., Any]) -> _Roots:
    roots = _function_roots(run)
    folder = f"papers.{paper}" if locate(f"papers.{paper}") else run.__module__.rpartition(".")[0]
    # experiment.py may register the method where the trainer finds it by name, unseen by any import.
    for module, wanted in ((f"{folder}.experiment", ()), (f"{folder}.method", None)):
        if module not in roots and locate(module):
            roots[module] = wanted
    return roots


def _closure(roots: _Roots) -> dict[str, str]:
    """Module -> hash of its counted part, for all modules that can be reached."""
    top_levels = {*OURS, *(name.partition(".")[0] for name in roots)}
    found: dict[str, str] = {}
    waiting = dict(roots)
    while waiting:
        name, wanted = waiting.popitem()
        path = locate(name)
        if path is None or name in found:
            continue
        stat = path.stat()
        found[name], imports = _select(path, stat.st_mtime_ns, stat.st_size, name, wanted)
        for imported in imports:
            if imported.partition(".")[0] in top_levels:
                waiting.update({parent: None for parent in _with_parents(imported) if _counts(parent, found)})
    return found


def _counts(name: str, found: Mapping[str, str]) -> bool:
    is_card = name.partition(".")[0] == "papers" and name.count(".") < 2
    return name not in found and name not in RECORDING and not is_card


def _with_parents(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]


def locate(name: str) -> Path | None:
    """File of a module (a package's `__init__.py`), without importing it."""
    top, *rest = name.split(".")
    try:
        spec = find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin)
    for part in rest:
        if path.name != "__init__.py":
            return None
        folder = path.parent / part
        path = folder / "__init__.py" if (folder / "__init__.py").exists() else path.parent / f"{part}.py"
    return path if path.suffix == ".py" and path.exists() else None


@cache
def _tree(path: Path, mtime_ns: int, size: int) -> ast.Module:
    """Parsed once per version of the file."""
    try:
        return _without_prose(ast.parse(path.read_bytes()))
    except SyntaxError as error:
        raise CodeUnknown(f"{path}, line {error.lineno}: {error.msg}. Correct it, then run again.") from error


@cache
def _select(
    path: Path, mtime_ns: int, size: int, module: str, wanted: tuple[str, ...] | None
) -> tuple[str, frozenset[str]]:
    """Hash of the statements of a file that count, and the modules they import."""
    tree = _tree(path, mtime_ns, size)
    body = tree.body if wanted is None else list(_reachable(tree.body, wanted))
    text = "\n".join(ast.dump(statement) for statement in body)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    imports = {name for statement in body for name in _imports(statement, package)}
    if "import_module" in text:
        imports |= {f"{package}.{file.stem}" for file in path.parent.glob("[!_]*.py")}
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_LENGTH], frozenset(imports)


def _without_prose(tree: ast.Module) -> ast.Module:
    """Drop docstrings, and `if TYPE_CHECKING` blocks, which never run."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            body[:] = [statement for statement in body if not _is_prose(statement)]
    return tree


def _is_prose(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant) and isinstance(statement.value.value, str)
    if isinstance(statement, ast.If) and isinstance(statement.test, ast.Name | ast.Attribute):
        return ast.unparse(statement.test).endswith("TYPE_CHECKING")
    return False


def _imports(statement: ast.stmt, package: str) -> set[str]:
    """Candidates for modules; names that turn out to be functions or classes are sorted out by `locate`."""
    names: set[str] = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(OURS):
            names.add(node.value.partition(":")[0].rstrip("."))
    return names


def _reachable(body: list[ast.stmt], wanted: Collection[str]) -> Iterable[ast.stmt]:
    """Statements of a module that the wanted names depend on, and those that act on import."""
    binders: dict[str, list[ast.stmt]] = {}
    waiting: list[ast.stmt] = []
    for statement in body:
        names = _binds(statement)
        for name in names:
            binders.setdefault(name, []).append(statement)
        if not names:
            waiting.append(statement)
    waiting += [statement for name in wanted for statement in binders.get(name, [])]
    kept: set[ast.stmt] = set()
    while waiting:
        statement = waiting.pop()
        if statement not in kept:
            kept.add(statement)
            for node in ast.walk(statement):
                if isinstance(node, ast.Name):
                    waiting += binders.get(node.id, [])
    return [statement for statement in body if statement in kept]


def _binds(statement: ast.stmt) -> set[str]:
    """Names that a top-level statement binds and does nothing else; empty if it may act on import."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        decorators = {ast.unparse(decorator).partition("(")[0] for decorator in statement.decorator_list}
        return {statement.name} if decorators <= {"dataclass", "dataclasses.dataclass", "lru_cache", "cache"} else set()
    if isinstance(statement, ast.ImportFrom):
        return {alias.asname or alias.name for alias in statement.names} - {"*"}
    if isinstance(statement, ast.Assign) and all(isinstance(target, ast.Name) for target in statement.targets):
        return {target.id for target in statement.targets if isinstance(target, ast.Name)}
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        return {statement.target.id}
    return set()
