"""Figures in the house style: colour-blind-safe, labels at the lines, readable at the width of a README.

Special: the same records give the same SVG, byte for byte (fixed hash salt, no date, rounded paths).

    figure = curves(results, "full_H", {"entropy": "entropy (nats)", "reward": "mean reward"})
    save(figure, Path("entropy"))        # entropy.svg and entropy.png

Needs the extra `plots`; matplotlib is imported when a figure is made.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.experiment.claims import FIRST_FREE_SEED, ClaimResult
from shared.experiment.contracts import AssayError
from shared.experiment.results import MissingRecords, Results, Row
from shared.experiment.statistics import t_quantile
from shared.experiment.wording import interval_text, number_text, seeds_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito (2008), without the yellow that white paper swallows.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#444444")
DASHES = ("solid", (0, (4, 1.5)), (0, (1, 1.2)))
VERDICT_COLOURS = {"reproduced": "#009E73", "contradicted": "#D55E00", "unresolved": "#777777"}
WIDTH_IN = 9.0
# Verdana is as wide as the font that the layout was made with, for machines that lack it.
FONTS = "'DejaVu Sans', Verdana, sans-serif"
DECIMALS = re.compile(r"-?\d+\.\d+")
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "assay",
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
}


class PlotsMissing(AssayError):
    """matplotlib is not installed."""


def style() -> Any:
    """Context in which figures are made and saved. Raises `PlotsMissing` without the extra."""
    try:
        import matplotlib
    except ImportError as error:
        raise PlotsMissing("figures need matplotlib: pip install -e '.[plots]'") from error
    return matplotlib.rc_context(STYLE)


def figure(columns: int = 1, rows: int = 1, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    """An empty figure as wide as a README and `height` inches per row, with its axes row by row."""
    with style():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        made = Figure(figsize=(WIDTH_IN, height * rows))
        FigureCanvasAgg(made)
        axes = made.subplots(rows, columns, squeeze=False)
    return made, list(axes.flat)


def save(made: Figure, stem: Path) -> None:
    """Write `stem`.svg and `stem`.png."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".svg").write_bytes(svg(made))
    stem.with_suffix(".png").write_bytes(png(made))


def svg(made: Figure) -> bytes:
    """SVG without date and creator; equal figures give equal bytes.

    Path coordinates keep two decimals (a hundredth of a point): half the bytes, and no last bit of another machine.
    """
    buffer = io.BytesIO()
    with style():
        made.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue().decode().replace("'DejaVu Sans'", FONTS)
    text = re.sub(r' d="[^"]*"', lambda path: DECIMALS.sub(_two_decimals, path[0]), text)
    return ("\n".join(line.strip() for line in text.splitlines()) + "\n").encode()


def _two_decimals(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def png(made: Figure) -> bytes:
    """PNG at 80 dots per inch with 128 colours (a quarter of the bytes), without the name of the software."""
    full, small = io.BytesIO(), io.BytesIO()
    with style():
        from PIL import Image

        made.savefig(full, format="png", dpi=80, metadata={"Software": None})
        Image.open(full).convert("RGB").quantize(128).save(small, format="png", optimize=True)
    return small.getvalue()


def curves(
    results: Results,
    study: str,
    metrics: Mapping[str, str],
    arms: Mapping[str, str] | None = None,
    x: str = "step",
    x_label: str = "",
) -> Figure:
    """One panel per metric, one line per arm: mean over seeds below 100 with its pointwise 95 % t interval.

    `metrics` maps a metric to the title of its panel, `arms` an arm to its label (default: all arms by name);
    `x_label` is what a step is called.
    Raises `MissingRecords` for an arm without records or a metric that was never logged.
    """
    labels = dict(arms or {arm: arm for arm in results.arms(study)})
    made, axes = figure(columns=len(metrics))
    for axis, (metric, title) in zip(axes, metrics.items(), strict=True):
        ends = []
        for index, arm in enumerate(labels):
            xs, means, halves = band(results.curves(study, arm), metric, x)
            if not xs:
                raise MissingRecords(f"arm {arm} of study {study} never logged {metric}: choose another metric")
            colour, dash = PALETTE[index % len(PALETTE)], DASHES[index // len(PALETTE) % len(DASHES)]
            axis.plot(xs, means, color=colour, linestyle=dash)
            low, high = ([m + s * h for m, h in zip(means, halves, strict=True)] for s in (-1, 1))
            axis.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
            ends.append((xs[-1], means[-1], labels[arm], colour))
        axis.set_title(title, loc="left")
        axis.set_xlabel(x_label or x)
        axis.margins(x=0)
        if axis is axes[0]:
            label_ends(axis, ends)
    return made


def band(runs: Mapping[int, Sequence[Row]], metric: str, x: str) -> tuple[list[float], list[float], list[float]]:
    """x values that every judged seed logged, mean of the metric there and half width of its 95 % interval."""
    series = [
        {row[x]: row[metric] for row in rows if metric in row and x in row}
        for seed, rows in runs.items()
        if seed < FIRST_FREE_SEED
    ]
    xs = sorted(set.intersection(*map(set, series))) if series else []
    columns = [[one[value] for one in series] for value in xs]
    means = [math.fsum(column) / len(column) for column in columns]
    return xs, means, [_half_width(column, mean) for column, mean in zip(columns, means, strict=True)]


def _half_width(values: Sequence[float], mean: float) -> float:
    n = len(values)
    if n < 2:
        return 0.0
    return t_quantile(n - 1) * math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def label_ends(axis: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write (x, y, label, colour) beside the last points, moved apart where they would overlap."""
    low, high = axis.get_ylim()
    height = axis.bbox.height / axis.figure.dpi
    gap = (high - low) * (13 / 72) / height
    ordered = sorted(ends, key=lambda end: end[1])
    places = _spread([end[1] for end in ordered], gap)
    shift = max(0.0, low - places[0]) - max(0.0, places[-1] - high)
    for (x, y, label, colour), place in zip(ordered, [place + shift for place in places], strict=True):
        axis.annotate(
            label,
            (x, y),
            xytext=(1.04, (place - low) / (high - low)),
            textcoords="axes fraction",
            color=colour,
            va="center",
            fontsize=9,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.6,
                "alpha": 0.7,
                "shrinkA": 1,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            },
        )


def _spread(places: Sequence[float], gap: float) -> list[float]:
    """Ascending places at least `gap` apart, each group of neighbours centred where it was."""
    groups: list[list[float]] = []
    for place in places:
        groups.append([place])
        while len(groups) > 1 and _centre(groups[-1]) - _centre(groups[-2]) < gap * _reach(groups[-2:]):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_centre(group) + gap * (k - (len(group) - 1) / 2) for group in groups for k in range(len(group))]


def _centre(group: Sequence[float]) -> float:
    return math.fsum(group) / len(group)


def _reach(pair: Sequence[Sequence[float]]) -> float:
    return (len(pair[0]) + len(pair[1])) / 2


def forest(judged: Sequence[ClaimResult]) -> Figure:
    """One row per claim: effect and 95 % interval against its threshold, coloured by verdict.

    Rows have their own scale, as effects have different units: the threshold is the line in the middle, the claimed
    side is to the right.
    """
    made, (axis,) = figure(height=0.7 + 0.36 * max(1, len(judged)))
    axis.axvline(0, color="#444444", linewidth=1)
    axis.grid(False)
    axis.axvspan(0, 1.15, color="#009E73", alpha=0.06, linewidth=0)
    for row, result in enumerate(judged):
        colour = VERDICT_COLOURS[result.verdict]
        _forest_row(axis, row, result, colour)
        numbers = "" if result.effect is None else f"{number_text(result.effect)}  {interval_text(result)}  "
        text = f"{numbers}n={seeds_text(result)}"
        axis.annotate(text, (1.02, row), xycoords=("axes fraction", "data"), va="center", fontsize=9, color="#444444")
    axis.set_yticks(range(len(judged)), [result.claim.id for result in judged])
    for label, result in zip(axis.get_yticklabels(), judged, strict=True):
        label.set_color(VERDICT_COLOURS[result.verdict])
    axis.set_xlim(-1.15, 1.15)
    axis.set_ylim(max(1, len(judged)) - 0.5, -0.5)
    axis.set_xticks([-0.575, 0, 0.575], ["against the claim", "threshold", "as claimed"])
    axis.spines["left"].set_visible(False)
    return made


def _forest_row(axis: Axes, row: int, result: ClaimResult, colour: str) -> None:
    if result.effect is None:
        axis.annotate(
            result.reason, (0, row), ha="center", va="center", fontsize=9, color="#777777", backgroundcolor="w"
        )
        return
    sign = 1 if result.claim.side == "greater" else -1
    shown = [value for value in (result.effect, result.low, result.high) if value is not None]
    places = [sign * (value - result.claim.threshold) for value in shown]
    scale = max(map(abs, places)) or 1.0
    places = [place / scale for place in places]
    axis.plot(places[1:], [row] * len(places[1:]), color=colour, linewidth=2.4, solid_capstyle="butt")
    axis.plot(places[:1], [row], "o", color=colour, markersize=6)


def heatmap(
    axis: Axes,
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    centre: float = 0.0,
) -> None:
    """Values (rows, columns) as coloured cells with the number inside; None stays empty. Orange below `centre`,
    purple above, equally strong at equal distance."""
    present = [value for row in values for value in row if value is not None]
    reach = max((abs(value - centre) for value in present), default=0.0) or 1.0
    grid = [[math.nan if value is None else value for value in row] for row in values]
    axis.imshow(grid, cmap="PuOr", vmin=centre - reach, vmax=centre + reach, aspect="auto")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            strong = value is not None and abs(value - centre) > 0.65 * reach
            text = "" if value is None else number_text(value)
            axis.text(j, i, text, ha="center", va="center", fontsize=9, color="white" if strong else "#222222")
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows)
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set_visible(False)
