"""`python -m papers dryrun PAPER`: what the paper's own setting needs, as a table, as JSON, and as launch files.

dry_run("cegppo", "7b", full("7b"), None, Assumptions())    # -> DryRun; .text() is at most 100 columns wide
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from shared.dryrun.count import Counts, count
from shared.dryrun.memory import BF16, FP32, RECOMPUTE, RankMemory, kv_cache_per_token, rank_memory
from shared.dryrun.scripts import GPU_SHARE, launch_files, server_tokens
from shared.dryrun.work import Assumptions, StepWork, step_work
from shared.experiment.catalog import full_setting
from shared.experiment.files import ensure_writable, write_atomic, write_json
from shared.experiment.overrides import suggest
from shared.experiment.provenance import ROOT
from shared.megatron.layout import ImpossibleLayout, Layout
from shared.rl.full import FullRL

WIDTH = 100
GIB = 2**30
MICRO_BATCH = 1


@dataclass(frozen=True)
class DryRun:
    """Everything the table shows. `ranks` holds one rank per pipeline stage, `one_node` those of `one_node_layout`.

    Memory is for sequences of the longest prompt and the longest response, work for the assumed mean (`mean`) and for
    responses that all reach the limit (`bound`).
    """

    paper: str
    size: str
    full: FullRL
    layout: Layout
    counts: Counts
    ranks: tuple[RankMemory, ...]
    one_node_layout: Layout | None
    one_node: tuple[RankMemory, ...]
    mean: StepWork
    bound: StepWork
    assumed: Assumptions

    @property
    def sequence_length(self) -> int:
        return self.full.max_prompt_tokens + self.full.max_response_tokens

    @property
    def peak_gib(self) -> float:
        """Memory of the fullest rank under the layout's own recomputation."""
        return peak_gib(self.ranks, self.layout)

    @property
    def checkpoint_gb(self) -> float:
        """10^9 bytes of a checkpoint: bfloat16 weights, float32 weights and both moments of Adam."""
        return (BF16 + 3 * FP32) * self.counts.total / 1e9

    @property
    def stop_seconds(self) -> int:
        """How long ranks may take to stop: they finish a step, at worst one of responses at the limit, and save."""
        return ceil(self.bound.seconds + self.checkpoint_gb / self.assumed.disk_gbs)

    def sequences_in_cache(self) -> int:
        """Sequences of full length whose keys and values fit beside the weights of an engine on one GPU."""
        free = self.assumed.gpu_gib * GPU_SHARE * GIB - BF16 * self.counts.total
        return max(0, int(free // (kv_cache_per_token(self.full.architecture) * self.sequence_length)))

    def as_json(self) -> dict[str, Any]:
        """Plain values, sums included. Bytes, tokens, FLOPs, seconds."""
        totals = {f"total_{mode}": [rank.total(mode) for rank in self.ranks] for mode in RECOMPUTE}
        hours = {
            "hours_mean": self.mean.hours(self.full.max_steps),
            "hours_bound": self.bound.hours(self.full.max_steps),
        }
        cache = {
            "kv_cache_bytes_per_token": kv_cache_per_token(self.full.architecture),
            "sequences_in_cache": self.sequences_in_cache(),
        }
        stop = {"checkpoint_gb": self.checkpoint_gb, "stop_seconds": self.stop_seconds}
        return {**asdict(self), "name": str(self.layout), "peak_gib": self.peak_gib, **totals, **cache, **hours, **stop}

    def text(self) -> str:
        """The table."""
        parts = (_heading(self), _memory(self), _cache(self), _work(self), _assumptions(self))
        return "\n\n".join("\n".join(part) for part in parts) + "\n"


def main(
    paper: str, sizes: Sequence[str], layout: Layout | None, assumed: Assumptions, runs_root: Path
) -> Iterator[str]:
    """Dry-run the chosen sizes, by default all; write the files of each, and yield its table.

    `layout` takes the place of the one in full.py. Raises `UnknownName` and `ImpossibleLayout` before anything is
    built, `Unwritable` for the folder.
    """
    setting = full_setting(paper)
    for size in sizes:
        if size not in setting.SIZES:
            raise suggest("size", size, setting.SIZES)
    for size in sizes or setting.SIZES:
        folder = ensure_writable(runs_root / paper / "full" / size)
        found = dry_run(paper, size, setting.full(size), layout, assumed)
        write_json(folder / "dryrun.json", found.as_json())
        write_atomic(folder / "dryrun.txt", found.text())
        full, small = found.full, found.one_node_layout
        for name, content in launch_files(paper, size, full, small, _from_root(folder), found.stop_seconds).items():
            write_atomic(folder / name, content)
        yield f"{found.text()}\nwritten    {folder}"


def _from_root(folder: Path) -> str:
    """As somebody in the root of the clone would write it."""
    whole = folder.resolve()
    return str(whole.relative_to(ROOT) if whole.is_relative_to(ROOT) else whole)


def dry_run(paper: str, size: str, full: FullRL, layout: Layout | None, assumed: Assumptions) -> DryRun:
    """Build, count and add up. Raises `ImpossibleLayout` before the model is built."""
    full = replace(full, layout=layout or full.layout)
    layout = full.layout
    length = full.max_prompt_tokens + full.max_response_tokens
    layout.check(full.architecture, length, _microbatches(full, layout))
    per_node = full.cluster.gpus_per_node
    if layout.world_size > per_node and layout.world_size % per_node:
        raise ImpossibleLayout(
            f"layout {layout} has {layout.world_size} ranks, which do not fill nodes of {per_node} GPUs: change dp"
        )
    counts = count(full.architecture, layout)
    small = one_node_layout(layout, per_node)
    return DryRun(
        paper=paper,
        size=size,
        full=full,
        layout=layout,
        counts=counts,
        ranks=_ranks(full, layout, counts),
        one_node_layout=small,
        one_node=_ranks(full, small, counts) if small else (),
        mean=step_work(full, counts, assumed),
        bound=step_work(full, counts, assumed, full.max_response_tokens),
        assumed=assumed,
    )


def one_node_layout(layout: Layout, gpus_per_node: int) -> Layout | None:
    """The same model parallelism on one node, with as much data parallelism as fits. None if nothing fits.

    Every rank then holds the parameters that it held before, so one count serves both.
    """
    dp = gpus_per_node // (layout.tp * layout.pp * layout.cp)
    if not dp or layout.tp * layout.cp * dp % layout.ep:
        return None
    return replace(layout, dp=dp)


def peak_gib(ranks: Sequence[RankMemory], layout: Layout) -> float:
    return max(rank.total(layout.recompute) for rank in ranks) / GIB


def _microbatches(full: FullRL, layout: Layout) -> int:
    return -(-full.minibatch_prompts * full.samples // (layout.dp * MICRO_BATCH))


def _ranks(full: FullRL, layout: Layout, counts: Counts) -> tuple[RankMemory, ...]:
    length = full.max_prompt_tokens + full.max_response_tokens
    shape = {"sequence_length": length, "micro_batch": MICRO_BATCH, "microbatches": _microbatches(full, layout)}
    return tuple(rank_memory(full.architecture, layout, stage, **shape) for stage in counts.stages)


def _entry(name: str, text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"{name:<11}", subsequent_indent=" " * 11)


def _heading(run: DryRun) -> list[str]:
    full, model, counts = run.full, run.full.architecture, run.counts
    mlp = f"ffn {model.ffn_hidden_size:,}"
    if model.moe:
        mlp = f"{model.moe.num_experts} experts of {model.moe.moe_ffn_hidden_size:,}, {model.moe.top_k} a token"
    active = f", {counts.active:,} of them active" if counts.active != counts.total else ""
    ranks = run.layout.world_size
    gpus, nodes = f"{ranks} GPU{'s' * (ranks > 1)}", -(-ranks // full.cluster.gpus_per_node)
    servers = full.rollout_nodes * full.cluster.gpus_per_node
    shape = f"{_microbatches(full, run.layout)} micro-batches of {MICRO_BATCH} x {run.sequence_length:,} tokens"
    theirs = f"{full.cluster.nodes} nodes of {full.cluster.gpus_per_node} GPUs, {full.cluster.backend}"
    return [
        f"{run.paper} {run.size}: dry run, nothing was trained (docs/dryrun.md)",
        "",
        *_entry(
            "model",
            f"{full.model}: {model.num_layers} layers, hidden {model.hidden_size:,}, {model.num_attention_heads} heads "
            f"in {model.num_query_groups} groups, {mlp}, vocabulary {model.vocab_size:,}",
        ),
        *_entry("", f"{counts.total:,} parameters{active}; in matrix products {counts.multiplied:,} per token"),
        *_entry(
            "training",
            f"{run.layout}: {gpus} on {nodes} node{'s' * (nodes > 1)}, {shape} a rank and update",
        ),
        *_entry("rollouts", f"{servers} vLLM servers with one GPU each, on {full.rollout_nodes} nodes"),
        *_entry(
            "the paper", f"{theirs}, sequence parallel {full.cluster.sequence_parallel}; the two lines above are ours"
        ),
    ]


def _memory(run: DryRun) -> list[str]:
    names = [mode + ("*" if mode == run.layout.recompute else "") for mode in RECOMPUTE]
    lines = [
        f"{'GiB per rank, bfloat16, longest sequences':<49}activations by recomputation",
        f"{'stage':>5}{'parameters':>16}{'weights':>9}{'grads':>8}{'Adam':>8}"
        + "".join(f"{name:>11}" for name in names)
        + f"{'logits':>9}{'sum*':>8}",
    ]
    for stage, rank in zip(run.counts.stages, run.ranks, strict=True):
        kept = "".join(f"{rank.activations[mode] / GIB:>11.2f}" for mode in RECOMPUTE)
        lines.append(
            f"{stage.stage:>5}{stage.parameters:>16,}{rank.weights / GIB:>9.2f}{rank.gradients / GIB:>8.2f}"
            f"{rank.optimizer / GIB:>8.2f}{kept}{rank.head / GIB:>9.2f}{rank.total(run.layout.recompute) / GIB:>8.1f}"
        )
    lines += ["", *_entry("fits", _verdict(run.peak_gib, run.assumed.gpu_gib, str(run.layout)))]
    if run.one_node_layout and run.one_node_layout != run.layout:
        small = peak_gib(run.one_node, run.one_node_layout)
        lines += _entry("one node", _verdict(small, run.assumed.gpu_gib, str(run.one_node_layout)))
    return lines


def _verdict(peak: float, gpu: float, layout: str) -> str:
    answer = "fits" if peak <= gpu else "DOES NOT FIT"
    return f"{layout}: {peak:.1f} GiB, {answer} into {gpu:g} GiB (before fragmentation and communication buffers)"


def _cache(run: DryRun) -> list[str]:
    token = kv_cache_per_token(run.full.architecture)
    text = (
        f"{token / 1024:g} KiB a token, {token * run.sequence_length / GIB:.2f} GiB a sequence of "
        f"{run.sequence_length:,} tokens, training's longest; beside the weights {run.sequences_in_cache()} such "
        "sequences fit into one GPU"
    )
    allowed = server_tokens(run.full)
    if allowed > run.sequence_length:
        text += f". Validation's longest has {allowed:,}, {token * allowed / GIB:.2f} GiB"
    return _entry("KV cache", text)


def _work(run: DryRun) -> list[str]:
    steps = run.full.max_steps
    columns = (run.mean, run.bound)
    rows: list[tuple[str, list[str]]] = [
        ("tokens generated", [f"{c.generated_tokens / 1e6:,.1f} M" for c in columns]),
        ("tokens trained on, at most", [f"{c.trained_tokens / 1e6:,.1f} M" for c in columns]),
        ("PFLOP to generate", [f"{c.rollout_flops / 1e15:,.0f}" for c in columns]),
        ("PFLOP to score the old policy", [f"{c.score_flops / 1e15:,.0f}" for c in columns]),
        ("PFLOP to update", [f"{c.update_flops / 1e15:,.0f}" for c in columns]),
        ("seconds generating", [f"{c.rollout_seconds:,.0f}" for c in columns]),
        ("seconds training", [f"{c.train_seconds:,.0f}" for c in columns]),
        (f"hours for {steps:,} steps", [f"{c.hours(steps):,.0f}" for c in columns]),
    ]
    widths = ("mean response " + f"{run.mean.response:,}", "all at the limit " + f"{run.bound.response:,}")
    lines = [f"{'one step':<34}{widths[0]:>26}{widths[1]:>28}"]
    lines += [f"{name:<34}{mean:>26}{bound:>28}" for name, (mean, bound) in rows]
    text = f"within {run.stop_seconds:,} s: a step at the limit, and a checkpoint of {run.checkpoint_gb:,.0f} GB"
    return [*lines, "", *_entry("to stop", text)]


def _assumptions(run: DryRun) -> list[str]:
    a = run.assumed
    speed = f"{run.mean.rollout_speed:,.0f} tokens per second and GPU"
    speed += "" if a.rollout_speed else " (an MFU of 5 % at the mean length)"
    text = (
        f"and not measured: training at an MFU of {a.mfu:g} of {a.gpu_tflops:g} TFLOP/s; rollouts at {speed}; "
        f"prompts of {a.mean_prompt:,} tokens; checkpoints at {a.disk_gbs:g} GB/s. Not in the hours: the wait for "
        "the longest response, grading, weight transfer, validation, restarts."
    )
    unsure = [f"{'unsure' if not i else '':<11}{line}" for i, line in enumerate(run.full.unsure)]
    return [
        *_entry("ASSUMED", text),
        *(line for row in unsure for line in textwrap.wrap(row, WIDTH, subsequent_indent=" " * 11)),
    ]
