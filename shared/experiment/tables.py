"""Regenerate everything that shows a number, from `results/` alone: claims.json, figures, README blocks, the board.

Special: the same records give the same bytes, so `--check` in CI proves that no number was written by hand.

    python -m papers tables            write
    python -m papers tables --check    write nothing; list what would change and fail

Blocks are named `claims`, `main-claims` (only must and should where there are more than 20), `cost`, or as in
`Experiment.tables` and `Experiment.figures`; the root README says which paper: `cegppo/claims`, or `board`. Figures are
drawn at every scale, blocks show `proxy`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from shared.experiment import board, catalog, markdown, plots
from shared.experiment.canary import stale_studies
from shared.experiment.claims import ClaimResult, claims_json, evaluate_all, principal
from shared.experiment.contracts import Experiment
from shared.experiment.results import ROOT, MissingRecords, Results
from shared.gpucheck import record as gpu

BLOCK_SCALE = "proxy"


class Paper:
    """The committed results of one paper, judged once and drawn once."""

    def __init__(self, experiment: Experiment, root: Path) -> None:
        self.experiment = experiment
        self.root = root
        self.dir = root / "results" / experiment.paper
        self.missing: dict[str, str] = {}

    @cached_property
    def judged(self) -> list[ClaimResult]:
        """Claims at proxy scale."""
        return evaluate_all(self.experiment, self.results(BLOCK_SCALE))

    def results(self, scale: str) -> Results:
        """Committed records at a scale."""
        return Results.committed(self.experiment.paper, scale, self.root)

    @cached_property
    def files(self) -> dict[Path, bytes]:
        """claims.json and figures of every scale that has records."""
        made: dict[Path, bytes] = {}
        for scale in sorted(path.name for path in self.dir.glob("*") if path.is_dir()):
            results = self.results(scale)
            if results.studies():
                judged = evaluate_all(self.experiment, results)
                made[results.dir / "claims.json"] = claims_json(judged).encode()
                made |= self._drawn(results, judged)
        return made

    def _drawn(self, results: Results, judged: list[ClaimResult]) -> dict[Path, bytes]:
        made: dict[Path, bytes] = {}
        for name, draw in {"claims": lambda _: plots.forest(principal(judged)), **self.experiment.figures}.items():
            try:
                with plots.style():
                    figure = draw(results)
            except MissingRecords as missing:
                self.missing[name] = str(missing)
                continue
            stem = results.dir / "figures" / name
            made |= {stem.with_suffix(".svg"): plots.svg(figure), stem.with_suffix(".png"): plots.png(figure)}
        return made

    def block(self, kind: str, name: str, folder: Path) -> str:
        """Content of a README block; `folder` is where the README lies."""
        results = self.results(BLOCK_SCALE)
        makers = {
            "claims": lambda _: markdown.claims_table(self.judged),
            "main-claims": lambda _: markdown.claims_table(principal(self.judged)),
            "cost": markdown.cost_table,
            **self.experiment.tables,
        }
        known = makers if kind == "table" else {"claims", *self.experiment.figures}
        if name not in known:
            raise markdown.BadBlock(f"{results.paper} has no {kind} {name}: choose one of {', '.join(sorted(known))}")
        if not results.studies():
            return f"*No committed results yet: `python -m papers run {results.paper} --all`, then promote.*"
        picture = results.dir / "figures" / f"{name}.svg"
        if kind == "figure" and picture in self.files:
            return f"![{name}]({Path(os.path.relpath(picture, folder)).as_posix()})"
        if kind == "figure":
            return self._not_yet(self.missing[name])
        try:
            return makers[name](results)
        except MissingRecords as missing:
            return self._not_yet(str(missing))

    def _not_yet(self, reason: str) -> str:
        return f"*Not yet: {reason.replace(str(self.root) + os.sep, '')}.*"

    def readme(self) -> dict[Path, bytes]:
        """The paper's README with its blocks filled, if it has one."""
        path = self.root / "papers" / self.experiment.paper / "README.md"
        return _filled(path, lambda kind, name: self.block(kind, name, path.parent), self.root)


def generate(root: Path = ROOT) -> dict[Path, bytes]:
    """path -> content of every generated file, README files included."""
    cards = catalog.cards()
    papers = {name: Paper(catalog.experiment(name), root) for name in catalog.experiments()}
    made: dict[Path, bytes] = {}
    for paper in papers.values():
        made |= paper.files | paper.readme()
    judged = {name: paper.judged for name, paper in papers.items()}
    stale = {name: stale_studies(paper.results(BLOCK_SCALE), root) for name, paper in papers.items()}
    checked = gpu.load_all(root)
    page = board.page(cards, judged, stale, gpu.line(checked, "../docs"))
    made[root / "papers" / "README.md"] = page.encode()

    def root_block(kind: str, name: str) -> str:
        paper, _, block = name.partition("/")
        if kind == "table" and name == "board":
            return board.summary(cards, judged, stale, "papers/", gpu.line(checked, "docs"))
        if paper not in papers or not block:
            raise markdown.BadBlock(f"README.md asks for {kind} {name}: write `board` or PAPER/NAME")
        return papers[paper].block(kind, block, root)

    return made | _filled(root / "README.md", root_block, root)


def _filled(path: Path, block: Callable[[str, str], str], root: Path) -> dict[Path, bytes]:
    if not path.exists():
        return {}
    return {path: markdown.fill(path.read_text(encoding="utf-8"), str(path.relative_to(root)), block).encode()}


def differing(made: dict[Path, bytes], root: Path = ROOT) -> list[Path]:
    """Files that are missing, differ, or are left over from a figure that no longer exists.

    Of a PNG only the existence counts, because rasterisers differ between machines; its SVG is compared.
    """
    changed = [path for path, content in made.items() if not path.exists() or _differs(path, content)]
    return changed + _leftovers(made, root)


def _differs(path: Path, content: bytes) -> bool:
    return path.suffix != ".png" and path.read_bytes() != content


def _leftovers(made: dict[Path, bytes], root: Path) -> list[Path]:
    return sorted(path for path in (root / "results").glob("*/*/figures/*") if path not in made)


def tables(check: bool = False, root: Path = ROOT) -> bool:
    """Regenerate, or with `check` only compare. Prints what changed; False if `check` found a difference."""
    made = generate(root)
    changed = differing(made, root)
    drawings = {path.with_suffix(".png") for path in changed if path.suffix == ".svg" and path in made}
    for path in changed:
        print(f"{'differs' if check else 'deleted' if path not in made else 'written'}: {path.relative_to(root)}")
    if check:
        print(
            "run `nox -s tables` and commit what it writes" if changed else f"{len(made)} generated files are current"
        )
        return not changed
    for path in {*changed, *drawings}:
        if path not in made:
            path.unlink()
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(made[path])
    if not changed:
        print(f"{len(made)} generated files are current")
    return True
