"""What a run ends with: fresh verdicts beside the committed ones, and where the plots are.

    report(EXPERIMENT, "proxy", Path("runs"))      prints, and writes runs/<paper>/proxy/report/

Fresh seeds are judged by the same rules as committed ones. The default command trains a headline subset, so its own
verdict is often `unresolved (3 of 5 seeds so far)`; the column `agrees` says whether it fits the committed result.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.experiment import markdown, plots
from shared.experiment.claims import CUSTOM, ClaimResult, Status, claims_json, compare, evaluate_all, principal
from shared.experiment.contracts import Experiment
from shared.experiment.files import write_atomic
from shared.experiment.results import ROOT, MissingRecords, Results
from shared.experiment.wording import interval_text, number_text, seeds_text, verdict_text

STATUS_STYLES = {"identical": "green", "OK": "green", "drifted": "yellow", "FAIL": "bold red", "-": "dim"}
NAMED = 6
VERDICT_STYLES = {"reproduced": "green", "contradicted": "red", "unresolved": "dim"}


@dataclass(frozen=True)
class Line:
    """One claim: fresh, committed (None without committed records) and how the two agree."""

    fresh: ClaimResult
    committed: ClaimResult | None
    status: Status


def report(experiment: Experiment, scale: str, runs_root: Path, as_json: bool = False, root: Path = ROOT) -> bool:
    """Judge the fresh runs, print the result and write report.md, claims.json and figures beside the runs.

    With `as_json` stdout gets JSON only. Returns False if a fresh interval shares no point with the committed one.
    """
    results = Results(runs_root, experiment.paper, scale)
    lines = judge(experiment, results, root)
    folder = results.dir / "report"
    folder.mkdir(parents=True, exist_ok=True)
    drawn, notes = _draw(experiment, results, [line.fresh for line in lines], folder)
    write_atomic(folder / "claims.json", claims_json([line.fresh for line in lines]))
    write_atomic(folder / "report.md", _page(experiment, scale, lines, drawn))
    if as_json:
        print(json.dumps([_entry(line) for line in lines], indent=1, ensure_ascii=False))
    else:
        _show(experiment, scale, lines, [folder / "report.md", *drawn], notes)
    return all(line.status != "FAIL" for line in lines)


def judge(experiment: Experiment, results: Results, root: Path = ROOT) -> list[Line]:
    """Every claim on fresh records, beside the committed result of the same scale."""
    fresh = evaluate_all(experiment, results)
    reference = Results.committed(experiment.paper, results.scale, root)
    if not reference.studies():
        return [Line(result, None, "-") for result in fresh]
    committed = evaluate_all(experiment, reference)
    return [Line(new, old, compare(new, old)) for new, old in zip(fresh, committed, strict=True)]


def _entry(line: Line) -> dict[str, object]:
    committed = line.committed.to_json() if line.committed else None
    return line.fresh.to_json() | {"committed": committed, "agrees": line.status}


def _draw(
    experiment: Experiment, results: Results, judged: Sequence[ClaimResult], folder: Path
) -> tuple[list[Path], list[str]]:
    """Paths of the PNG files written (an SVG lies beside each), and what to tell about those that were not."""
    shown = principal([result for result in judged if result.effect is not None])
    forest = {"claims": lambda _: plots.forest(shown)} if shown else {}
    drawn, notes = [], []
    for name, draw in {**forest, **experiment.figures}.items():
        try:
            with plots.style():
                plots.save(draw(results), folder / name)
            drawn.append(folder / f"{name}.png")
        except MissingRecords:
            continue
        except plots.PlotsMissing as missing:
            return [], [str(missing)]
        except Exception as error:  # hours of training end here: a broken figure must not hide the verdicts
            notes.append(f"figure {name} failed: {type(error).__name__}: {error}")
    return drawn, notes


def _show(
    experiment: Experiment, scale: str, lines: Sequence[Line], paths: Sequence[Path], notes: Sequence[str]
) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    compared = any(line.committed for line in lines)
    title = f"{experiment.paper} at {scale} scale"
    table = Table(title=title, title_justify="left", title_style="bold", pad_edge=False)
    table.box, table.header_style = box.SIMPLE_HEAD, "bold"
    table.add_column("claim", no_wrap=True)
    for header in ("this run", *(("committed", "agrees") if compared else ())):
        table.add_column(header, no_wrap=True, min_width=len("identical"))
    judged = [line for line in lines if line.fresh.effect is not None]
    chosen = {result.claim.id for result in principal([line.fresh for line in judged])}
    shown = [line for line in judged if line.fresh.claim.id in chosen or line.status in ("drifted", "FAIL")]
    for line in shown:
        cells = [line.fresh.claim.id, _cell(line.fresh, compared)]
        if line.committed:
            cells += [_cell(line.committed, compared), f"[{STATUS_STYLES[line.status]}]{line.status}[/]"]
        table.add_row(*cells)
    console.print()
    if shown:
        console.print(table)
    console.print(_tally(lines, len(judged) - len(shown)), soft_wrap=True)
    for text in (*_remarks(lines, scale, compared), *notes, ""):
        console.print(text, markup=False, soft_wrap=True)
    for path in paths:
        console.print(os.path.relpath(path), markup=False, soft_wrap=True)


def _tally(lines: Sequence[Line], hidden: int) -> str:
    """Verdicts of all claims, how many agree, and how many the table leaves out."""
    verdicts = Counter(line.fresh.verdict for line in lines)
    parts = [f"{count} {verdict}" for verdict, count in verdicts.most_common()]
    agreement = Counter(line.status for line in lines if line.committed and line.status != "-")
    if agreement:
        parts[-1] += "; against committed: " + ", ".join(f"{n} {status}" for status, n in agreement.most_common())
    more = f" ({hidden} of strength `may` only in report.md)" if hidden else ""
    return f"{len(lines)} claims: {', '.join(parts)}{more}"


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _cell(result: ClaimResult, stacked: bool) -> str:
    """Effect, interval, verdict; effect and interval on two lines where two such columns must share 80 characters."""
    numbers = _plain(result).replace(" [", "\n[" if stacked else " [").replace("[", r"\[")
    return f"{numbers}\n[{VERDICT_STYLES[result.verdict]}]{result.verdict}[/], n = {seeds_text(result)}"


def _remarks(lines: Sequence[Line], scale: str, compared: bool) -> list[str]:
    """What the table does not hold: reasons, claims without runs, what there is to compare with."""
    reasons: dict[str, list[str]] = {}
    for line in lines:
        unrun = line.fresh.effect is None and line.fresh.n_seeds == 0
        reason = "not judged, no complete runs" if unrun else line.fresh.reason
        reasons.setdefault(reason, []).append(line.fresh.claim.id)
    remarks = [f"{reason}: {_names(names)}" for reason, names in reasons.items() if reason]
    if scale == "smoke":
        remarks.append("The smoke scale tests the plumbing; its numbers mean nothing.")
    elif scale.endswith(CUSTOM):
        remarks.append("Overridden configs are never compared with committed results.")
    elif not compared:
        remarks.append("There are no committed results yet to compare with.")
    return remarks


def _page(experiment: Experiment, scale: str, lines: Sequence[Line], drawn: Sequence[Path]) -> str:
    header = ("claim", "fresh", "n", "verdict", "committed", "agrees")
    rows = [
        (
            f"**{line.fresh.claim.id}**: {line.fresh.claim.statement}",
            _plain(line.fresh),
            seeds_text(line.fresh),
            verdict_text(line.fresh),
            f"{_plain(line.committed)}, {line.committed.verdict}" if line.committed else "-",
            line.status,
        )
        for line in lines
    ]
    parts = [f"# {experiment.paper} at {scale} scale, fresh runs", markdown.table(header, rows)]
    parts += [f"![{path.stem}]({path.with_suffix('.svg').name})" for path in drawn]
    return "\n\n".join(parts) + "\n"


def _plain(result: ClaimResult) -> str:
    return "-" if result.effect is None else f"{number_text(result.effect)} {interval_text(result)}"
