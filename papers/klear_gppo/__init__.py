"""GPPO, from Klear-Reasoner (arXiv 2508.07629): so far the loss alone, used by CE-GPPO and tested here."""

from shared.experiment.contracts import Card

CARD = Card(
    paper="klear_gppo",
    title="Klear-Reasoner: Advancing Reasoning Capability via Gradient-Preserving Clipping Policy Optimization",
    arxiv="2508.07629",
    claims=("Keeping a bounded gradient for clipped tokens beats clip-higher and CISPO",),
    scales=(),
    cost_cpu_s={},
)
