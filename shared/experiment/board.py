"""The board: which papers there are, what was found, what it costs to find it again.

Special: `papers list` and `papers show` read CARDs and committed claims.json only, so they answer at once.

    python -m papers list [--json]
    python -m papers show cegppo [--json]
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.experiment import catalog, markdown
from shared.experiment.claims import ClaimResult
from shared.experiment.contracts import Card
from shared.experiment.results import ROOT

VERDICTS = ("reproduced", "contradicted", "unresolved")


def verdicts(paper: str, root: Path = ROOT) -> dict[str, list[dict[str, Any]]]:
    """scale -> entries of its committed claims.json."""
    paths = sorted((root / "results" / paper).glob("*/claims.json"))
    return {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def list_papers(as_json: bool = False, root: Path = ROOT) -> None:
    """Print one line per paper: title, verdict counts at proxy scale, cost of the headline set in CPU-seconds."""
    cards = catalog.cards()
    rows = [_listed(card, verdicts(name, root)) for name, card in cards.items()]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("paper", "title", "arXiv", "verdicts"):
        table.add_column(title, no_wrap=title != "title")
    table.add_column("CPU-s", justify="right")
    for row in rows:
        cells = (row["paper"], row["title"], row["arxiv"], counts_text(row["verdicts"]))
        table.add_row(*cells, f"{row['cost_cpu_s'].get('headline', 0):,.0f}")
    console = Console()
    console.print(table)
    console.print("\npython -m papers show PAPER    its claims and verdicts", highlight=False)
    console.print("python -m papers run PAPER     train and judge the headline set", highlight=False)


def show_paper(paper: str, as_json: bool = False, root: Path = ROOT) -> None:
    """Print the claims of a paper in words, its committed verdicts per scale, what it costs and how to run it.

    Raises `UnknownName` with the closest name.
    """
    card = catalog.card(paper)
    found = verdicts(paper, root)
    if as_json:
        print(json.dumps(_listed(card, found) | {"claims": list(card.claims), "results": found}, indent=1))
        return
    from rich.console import Console

    console = Console(highlight=False)
    console.print(f"[bold]{card.title}[/bold]\narXiv {card.arxiv}, papers/{paper}/README.md\n")
    for number, claim in enumerate(card.claims, 1):
        console.print(f"{number}. {claim}", markup=False)
    for scale, entries in found.items():
        console.print(f"\n[bold]Committed verdicts at {scale} scale[/bold]")
        for entry in entries:
            line = f"{entry['verdict']:<13} {entry['id']} ({entry['strength']}): {entry['statement']}"
            console.print(line, markup=False)
    if not found:
        console.print("\nNo committed verdicts yet.")
    costs = ", ".join(f"{name} {seconds:,.0f}" for name, seconds in card.cost_cpu_s.items())
    console.print(f"\nCPU-seconds: {costs}. Data: {', '.join(card.data) or 'generated, nothing to fetch'}.")
    console.print(f"python -m papers run {paper} [--all] [--scale {'|'.join(card.scales)}]", markup=False)


def _listed(card: Card, found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    counts = Counter(entry["verdict"] for entry in found.get("proxy", ()))
    return {
        "paper": card.paper,
        "title": card.title,
        "arxiv": card.arxiv,
        "scales": list(card.scales),
        "cost_cpu_s": dict(card.cost_cpu_s),
        "data": list(card.data),
        "verdicts": {verdict: counts[verdict] for verdict in VERDICTS},
    }


def counts_text(counts: Mapping[str, int]) -> str:
    """`3 reproduced, 1 contradicted`, without the zeros."""
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count) or "no results yet"


def summary(
    cards: Mapping[str, Card],
    judged: Mapping[str, Sequence[ClaimResult]],
    stale: Mapping[str, Mapping[str, str]],
    prefix: str,
    gpu_line: str,
) -> str:
    """Markdown table with one row per paper, then `gpu_line`; `prefix` leads from the README to papers/.

    A count reads `must and should claims + may claims`: among the latter are counter-examples and details, whose
    contradiction says little about the paper.
    """
    rows = []
    for name, card in cards.items():
        counts = Counter((result.verdict, result.claim.strength == "may") for result in judged.get(name, ()))
        since = "".join(f"; {study} stale since {commit}" for study, commit in stale.get(name, {}).items())
        cost = ", ".join(f"{key} {seconds:,.0f}" for key, seconds in card.cost_cpu_s.items())
        link = f"[{card.arxiv}](https://arxiv.org/abs/{card.arxiv})" if card.arxiv[:1].isdigit() else card.arxiv
        numbers = [f"{counts[verdict, False]} + {counts[verdict, True]}" for verdict in VERDICTS]
        numbers[-1] += since
        rows.append((f"[{name}]({prefix}{name}) {card.title}", link, *numbers, cost))
    return markdown.table(("paper", "arXiv", *VERDICTS, "CPU-seconds to re-run"), rows) + f"\n\n{gpu_line}"


def page(
    cards: Mapping[str, Card],
    judged: Mapping[str, Sequence[ClaimResult]],
    stale: Mapping[str, Mapping[str, str]],
    gpu_line: str,
) -> str:
    """Text of papers/README.md: the summary, then every claim of every paper."""
    parts = [
        "<!-- Generated by `nox -s tables` from the cards and results/: edit those. -->",
        "# The board",
        "Every paper, every claim, every verdict at proxy scale. An effect is a contrast between arms, its interval "
        "covers 95 %, n counts seeds; how a verdict comes about is told in [docs/verdicts.md](../docs/verdicts.md). "
        "Counts read *must and should claims + may claims*; the latter hold counter-examples and details.",
        summary(cards, judged, stale, "", gpu_line),
    ]
    for name, results in judged.items():
        if name in cards:
            parts += [f"## [{name}]({name})", markdown.claims_table(results)]
    return "\n\n".join(parts) + "\n"
