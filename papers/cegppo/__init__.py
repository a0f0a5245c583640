"""CE-GPPO (arXiv 2509.20712): coordinate entropy by keeping, and scaling, the gradients that clipping drops."""

from shared.experiment.contracts import Card

CARD = Card(
    paper="cegppo",
    title="CE-GPPO: Coordinating Entropy via Gradient-Preserving Clipping Policy Optimization in RL",
    arxiv="2509.20712",
    claims=(
        "Clipped tokens are improbable ones: below the lower bound they push entropy down, above the upper bound up",
        "Entropy falls with beta1 and rises with beta2; (0.5, 1) stays steady where GRPO collapses",
        "Better held-out accuracy than GRPO and DAPO, no spikes in KL or gradient norm, low sensitivity to the betas",
    ),
    scales=("smoke", "proxy"),
    cost_cpu_s={"headline": 2200.0, "all": 17000.0},
)
