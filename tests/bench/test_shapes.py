"""The README declares the shapes, peers and rounds that the code measures."""

from __future__ import annotations

import re

from bench.report import README
from bench.shapes import PEERS, REPETITIONS, RESUME_REPETITIONS, TRAINING, TrainingShape

TEXT = README.read_text()


def declared(shape: TrainingShape) -> str:
    m = shape.model
    cells = (
        shape.name,
        m.num_layers,
        m.hidden_size,
        f"{m.num_attention_heads} x {m.head_dim}",
        m.num_query_groups,
        m.ffn_hidden_size,
        m.vocab_size,
        "tied" if m.tie_embeddings else "untied",
        f"{shape.batch} x {shape.length}",
        shape.steps,
        f">= {shape.target} of each peer",
    )
    return f"| {' | '.join(map(str, cells))} |"


def test_the_readme_lists_exactly_the_shapes() -> None:
    assert re.findall(r"^\| [hd]\d+-\d.* of each peer \|$", TEXT, re.MULTILINE) == [declared(s) for s in TRAINING]


def test_the_readme_names_the_versions_of_the_peers() -> None:
    assert ", ".join(f"{name} {version}" for name, version in PEERS.items()) in TEXT
    constraints = (README.parent.parent / "constraints.txt").read_text().splitlines()
    assert {f"{name}=={version}" for name, version in PEERS.items()} <= set(constraints)


def test_the_readme_says_how_many_rounds() -> None:
    protocol, _, resuming = TEXT.partition("## Resuming")
    assert f"- {REPETITIONS} rounds." in protocol
    assert f"{RESUME_REPETITIONS} rounds" in resuming
