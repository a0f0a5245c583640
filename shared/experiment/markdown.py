"""Markdown that is made, never written: tables of claims and costs, and the blocks of a README they go into.

<!-- assay:table claims -->
... replaced by `python -m papers tables` ...
<!-- /assay -->
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from shared.experiment.claims import ClaimResult
from shared.experiment.contracts import AssayError
from shared.experiment.results import Results
from shared.experiment.wording import contrast_text, interval_text, number_text, seeds_text, verdict_text

BLOCK = re.compile(r"(<!-- assay:(table|figure) (\S+) -->\n)(.*?)(<!-- /assay -->)", re.DOTALL)
OPENING = re.compile(r"^<!-- assay:", re.MULTILINE)


class BadBlock(AssayError):
    """A marker in a README that is not closed, or names something that does not exist."""


def fill(text: str, where: str, block: Callable[[str, str], str]) -> str:
    """Replace the content of every block by `block(kind, name)`. Text without blocks comes back as it is."""
    if len(OPENING.findall(text)) != len(BLOCK.findall(text)):
        raise BadBlock(
            f"{where}: every <!-- assay:table NAME --> or <!-- assay:figure NAME --> needs its <!-- /assay -->"
        )
    return BLOCK.sub(lambda match: f"{match[1]}\n{block(match[2], match[3]).strip()}\n\n{match[5]}", text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown table; bars and line ends inside cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        f"| {' | '.join(' '.join(cell.replace('|', chr(92) + '|').split()) for cell in row)} |" for row in lines
    )


def claims_table(judged: Sequence[ClaimResult]) -> str:
    """Every claim with its test, the paper's value, effect, 95 % interval, seeds and verdict."""
    header = ("claim", "what is tested", "paper", "effect", "95 % interval", "n", "verdict")
    return table(header, [claim_row(result) for result in judged])


def claim_row(result: ClaimResult) -> tuple[str, ...]:
    """Cells of one claim."""
    claim = result.claim
    return (
        f"**{claim.id}** ({claim.strength}): {claim.statement}",
        f"`{contrast_text(claim)}`",
        claim.paper_value or "-",
        number_text(result.effect),
        interval_text(result),
        seeds_text(result),
        verdict_text(result).replace(result.verdict, f"**{result.verdict}**", 1),
    )


def cost_table(results: Results) -> str:
    """What the committed runs cost: CPU-seconds and the highest memory of a process."""
    rows = []
    for study in results.studies():
        costs = [cost for arm in results.arms(study) for cost in results.cost(study, arm).values()]
        total = sum(cost["cpu_s"] for cost in costs)
        peak = max(cost["max_rss_mb"] for cost in costs)
        mean = number_text(total / len(costs))
        rows.append((study, str(len(results.arms(study))), str(len(costs)), mean, f"{total:,.0f}", f"{peak:,.0f}"))
    return table(("study", "arms", "runs", "CPU-s a run", "CPU-s", "peak memory (MiB)"), rows)
