"""Seconds of a fresh process until its first step after a checkpoint (`python -m bench.resume NAME FOLDER` is one)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.measure import scratch
from bench.shapes import BETAS, GRAD_CLIP, LR, RESUME_BATCH, STATE, WEIGHT_DECAY

PHASES = ("start", "imports", "build", "load", "step")


class Marks:
    """Wall and CPU seconds of each phase of this process. `started` is the wall clock when it was asked for."""

    def __init__(self, started: float) -> None:
        self.marks = [(started, 0.0)]
        self.mark()

    def mark(self) -> None:
        """End of a phase."""
        self.marks.append((time.time(), time.process_time()))

    def phases(self) -> dict[str, dict[str, float]]:
        """Phase -> seconds."""
        between = zip(PHASES, pairwise(self.marks), strict=True)
        return {name: {"wall_s": round(b[0] - a[0], 3), "cpu_s": round(b[1] - a[1], 3)} for name, (a, b) in between}


def measure(repetitions: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """One entry per contestant: seconds of every phase, one per round."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTESTANTS}
    with scratch() as folder:
        write_checkpoints(folder)
        names = list(CONTESTANTS)
        for repetition in range(-1, repetitions):
            first = repetition % len(names)
            for name in names[first:] + names[:first]:
                phases = in_fresh_process(name, folder)
                if repetition >= 0:  # the first round fills the file cache
                    found[name].append(phases)
    entries = [{"name": name, "phases": phases} for name, phases in found.items()]
    for entry in entries:
        say(f"{entry['name']}: {', '.join(str(total(phases, 'wall_s')) for phases in entry['phases'])} s")
    return entries


def total(phases: dict[str, dict[str, float]], clock: str) -> float:
    """Seconds from the start of the process to the end of its first step."""
    return round(sum(phase[clock] for phase in phases.values()), 3)


def in_fresh_process(name: str, folder: Path) -> dict[str, Any]:
    """Phases of one contestant in a process of its own, on one thread."""
    command = [sys.executable, "-m", "bench.resume", name, str(folder), repr(time.time())]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def write_checkpoints(folder: Path) -> None:
    """The same state for everybody, each in its own format."""
    import torch

    from bench.checkpoints import parallel_model, training_state
    from shared.training.checkpoint import Checkpoints
    from shared.training.distributed_checkpoint import DistributedCheckpoints

    Checkpoints(folder / "assay").save(1, training_state(STATE))
    model, contents = parallel_model(STATE)
    DistributedCheckpoints(folder / "assay-parallel").save(1, model.sharded_state(), contents)
    for name, build in (("transformers", _transformers), ("minimal", _minimal)):
        peer = build()
        optimizer = _adamw(peer)
        _step(peer, optimizer)
        torch.save({"model": peer.state_dict(), "optimizer": optimizer.state_dict()}, folder / f"{name}.pt")


def assay(folder: Path, marks: Marks) -> None:
    """build_model and Checkpoints, as the warm start and the RL trainer resume."""
    from shared.megatron.model import build_model, forward_logits
    from shared.training.checkpoint import Checkpoints

    marks.mark()
    model = build_model(STATE, seed=0, device="cpu")
    optimizer = _adamw(model)
    marks.mark()
    found = Checkpoints(folder / "assay").latest()
    assert found is not None
    model.load_state_dict(found[1]["model"])
    optimizer.load_state_dict(found[1]["optimizer"])
    marks.mark()
    _step(lambda tokens_BT: forward_logits(model, tokens_BT), optimizer)


def assay_parallel(folder: Path, marks: Marks) -> None:
    """ParallelModel and DistributedCheckpoints, as pretraining resumes."""
    import torch

    from shared.megatron.optimizer import AdamWConfig
    from shared.megatron.parallel import Microbatch, ParallelModel
    from shared.training.distributed_checkpoint import DistributedCheckpoints

    marks.mark()
    adamw = AdamWConfig(lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, decay_vectors=True, grad_clip=GRAD_CLIP)
    model = ParallelModel(STATE, adamw, seed=None, device="cpu")
    marks.mark()
    checkpoints = DistributedCheckpoints(folder / "assay-parallel")
    stored = checkpoints.latest()
    assert stored is not None
    state = model.sharded_state(loading=True)
    model.load_sharded_state(checkpoints.load(stored, state, model=STATE, precision="fp32"))
    marks.mark()
    tokens_BT = torch.zeros(RESUME_BATCH, dtype=torch.int64)
    model.train_step([Microbatch(tokens_BT, tokens_BT, torch.ones(RESUME_BATCH))], LR)


def transformers(folder: Path, marks: Marks) -> None:
    """transformers' own model from torch.load."""
    from transformers import LlamaForCausalLM  # noqa: F401

    _peer(_transformers, folder / "transformers.pt", marks)


def minimal(folder: Path, marks: Marks) -> None:
    """The hand-written Llama from torch.load."""
    import bench.minimal  # noqa: F401

    _peer(_minimal, folder / "minimal.pt", marks)


def _peer(build: Callable[[], Any], path: Path, marks: Marks) -> None:
    import torch

    marks.mark()
    model = build()
    optimizer = _adamw(model)
    marks.mark()
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    marks.mark()
    _step(model, optimizer)


def _transformers() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=STATE.vocab_size,
        hidden_size=STATE.hidden_size,
        intermediate_size=STATE.ffn_hidden_size,
        num_hidden_layers=STATE.num_layers,
        num_attention_heads=STATE.num_attention_heads,
        num_key_value_heads=STATE.num_query_groups,
        max_position_embeddings=STATE.max_sequence_length,
        tie_word_embeddings=STATE.tie_embeddings,
        use_cache=False,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation="sdpa").train()


def _minimal() -> Any:
    from bench.minimal import MinimalLlama

    return MinimalLlama(STATE)


def _adamw(model: Any) -> Any:
    import torch

    return torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)


def _step(model: Any, optimizer: Any) -> None:
    import torch

    tokens_BT = torch.zeros(RESUME_BATCH, dtype=torch.int64)
    out = model(tokens_BT)
    logits_BTV = getattr(out, "logits", out)
    torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT.flatten()).backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, GRAD_CLIP)
    optimizer.step()


CONTESTANTS: dict[str, Callable[[Path, Marks], None]] = {
    "assay": assay,
    "assay-parallel": assay_parallel,
    "transformers": transformers,
    "minimal": minimal,
}


def main() -> None:
    """One contestant; prints the seconds of its phases as JSON."""
    name, folder, started = sys.argv[1:]
    marks = Marks(float(started))
    CONTESTANTS[name](Path(folder), marks)
    marks.mark()
    print(json.dumps(marks.phases()))


if __name__ == "__main__":
    main()
