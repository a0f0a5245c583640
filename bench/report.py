"""The tables of README.md, from the JSON files in results/. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.measure import spread
from shared.experiment.markdown import fill, table

ROOT = Path(__file__).resolve().parent
README, RESULTS = ROOT / "README.md", ROOT / "results"


def readme(text: str, results: Path = RESULTS) -> str:
    """`text` with every block made anew."""
    return fill(text, "bench/README.md", lambda _, name: block(name, results / f"{name}.json"))


def block(name: str, path: Path) -> str:
    """Table and footnote of one result file."""
    if not path.exists():
        return "*Not measured yet.*"
    result = json.loads(path.read_text())
    return f"{TABLES[name](result['entries'])}\n\n{footnote(result)}"


def footnote(result: dict[str, Any]) -> str:
    """What ran where."""
    machine, load = result["machine"], result["load_average"]
    packages = ", ".join(f"{name} {machine['packages'][name]}" for name in ("torch", "transformers", "megatron-core"))
    tree = "with changes that are not in it" if machine["dirty"] else "clean"
    return (
        f"{machine['processor']}, {machine['cores']} cores, load {load['before']:.1f} before and {load['after']:.1f} "
        f"after; {result['repetitions']} rounds; {packages}; commit {machine['commit'][:7]}, {tree}."
    )


def training(entries: list[dict[str, Any]]) -> str:
    """One row per shape and contestant of ours."""
    header = ("shape", "", "tokens per CPU-s", "transformers", "minimal", "vs transformers", "vs minimal", "target")
    rows = []
    for entry in entries:
        speed = {name: f"{row['tokens_per_cpu_s']:,.0f}" for name, row in entry["rows"].items()}
        for name, row in entry["rows"].items():
            if "ratio" in row:
                against = [_range(row["ratio"][peer]) for peer in ("transformers", "minimal")]
                verdict = f">= {entry['target']}: {'met' if entry['met'] else 'missed'}" if name == "assay" else "-"
                rows.append(
                    (entry["shape"], name, speed[name], speed["transformers"], speed["minimal"], *against, verdict)
                )
    return table(header, rows)


def checkpoints(entries: list[dict[str, Any]]) -> str:
    """One row per way of saving or loading."""
    rows = []
    for entry in entries:
        for name, row in entry["rows"].items():
            seconds = spread([1000 * value for value in row["wall_s"]])
            rows.append((entry["what"], name, f"{row['mb_per_s']:,.0f}", _range(seconds, 0)))
    return table(("", "", "MB/s", f"ms for {entries[0]['megabytes']:.0f} MB"), rows)


def resume(entries: list[dict[str, Any]]) -> str:
    """One row per contestant, medians of the wall clock by phase, CPU-seconds in all."""
    phases = list(entries[0]["phases"][0])
    rows = []
    for entry in entries:
        cells = [f"{spread([r[phase]['wall_s'] for r in entry['phases']])['median']:.2f}" for phase in phases]
        totals = [
            _range(spread([sum(phase[clock] for phase in r.values()) for r in entry["phases"]]))
            for clock in ("wall_s", "cpu_s")
        ]
        rows.append((entry["name"], *cells, *totals))
    return table(("", *(f"{phase} (s)" for phase in phases), "total (s)", "CPU-s"), rows)


def _range(values: dict[str, float], digits: int = 2) -> str:
    return f"{values['median']:.{digits}f} ({values['low']:.{digits}f} to {values['high']:.{digits}f})"


TABLES = {"training": training, "checkpoints": checkpoints, "resume": resume}
