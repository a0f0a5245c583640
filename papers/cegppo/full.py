"""The paper's own runs at 1.5B and 7B, as the sheet records them from the released scripts. Not run here.

from papers.cegppo.full import full
full("7b").loss_fields["beta1"]      # 0.75
"""

from __future__ import annotations

from typing import Literal

from shared.megatron.config import ModelConfig
from shared.megatron.layout import Layout
from shared.rl.full import Cluster, FullRL, Validation

SIZES = ("1.5b", "7b")

BETA1 = {"1.5b": 0.5, "7b": 0.75}
RESPONSE_TOKENS = {"1.5b": 16_384, "7b": 32_768}

ARCHITECTURE = {
    "1.5b": ModelConfig(
        num_layers=28,
        hidden_size=1536,
        num_attention_heads=12,
        num_query_groups=2,
        head_dim=128,
        ffn_hidden_size=8960,
        vocab_size=151_936,
        max_sequence_length=131_072,
        tie_embeddings=False,
        norm_eps=1e-6,
        qkv_bias=True,
    ),
    "7b": ModelConfig(
        num_layers=28,
        hidden_size=3584,
        num_attention_heads=28,
        num_query_groups=4,
        head_dim=128,
        ffn_hidden_size=18_944,
        vocab_size=152_064,
        max_sequence_length=131_072,
        tie_embeddings=False,
        norm_eps=1e-6,
        qkv_bias=True,
    ),
}
"""DeepSeek-R1-Distill-Qwen is Qwen2 with rope theta 10,000 and an output head of its own.

7b: sizes, theta, epsilon and context as a GGUF conversion prints them (github.com/likelovewant/ollama-for-amd, issue
54); vocabulary and the untied head from config.json as recalled. 1.5b: layers, widths and heads as in Qwen2.5-1.5B's
config.json, which its base Qwen2.5-Math-1.5B shares; theta, context and the untied head as recalled. The totals, 1.78
and 7.62 billion parameters, are the published ones.
"""

LAYOUT = {
    "1.5b": Layout(tp=2, dp=16, sequence_parallel=True, distributed_optimizer=True),
    "7b": Layout(tp=4, dp=8, sequence_parallel=True, distributed_optimizer=True),
}
"""Ours: 4 of the 16 nodes train, since generation is most of the work (docs/dryrun.md)."""


def full(size: Literal["1.5b", "7b"]) -> FullRL:
    """Whole config of a run. Source: Kwai-Klear/CE-GPPO, recipe/dapo/*.sh and README."""
    return FullRL(
        model=f"deepseek-ai/DeepSeek-R1-Distill-Qwen-{size.upper()}",
        architecture=ARCHITECTURE[size],
        data="Kwai-Klear/KlearReasoner-MathSub-30K",
        reward="+1 / -1 from math-verify on the whole response, no think-tag check",
        loss="ce_gppo",
        loss_fields={"beta1": BETA1[size], "beta2": 1.0, "eps_low": 0.2, "eps_high": 0.2, "clip_ratio_c": 10.0},
        positive_coef=0.1,
        aggregation="token-mean",
        gen_prompts=256,
        train_prompts=128,
        minibatch_prompts=16,
        samples=8,
        temperature=1.0,
        top_p=1.0,
        max_prompt_tokens=4096,
        max_response_tokens=16_384,
        lr=1e-6,
        warmup_steps=10,
        weight_decay=0.1,
        grad_clip=1.0,
        epochs=10,
        max_steps=1000,
        cluster=Cluster(nodes=16, gpus_per_node=8, backend="FSDP", sequence_parallel=4),
        layout=LAYOUT[size],
        rollout_nodes=12,
        validation=Validation(
            benchmarks=("aime24", "aime25", "hmmt_feb", "math500", "amc23"),
            samples=32,
            temperature=0.6,
            top_p=0.95,
            max_response_tokens=RESPONSE_TOKENS[size],
        ),
        unsure=(
            "beta1 is 0.25 in the code's config, 0.75 in the README snippet; the per-size values are the paper's",
            "avg@32 is documented for AIME; the sheet does not state the samples of the other benchmarks",
            "about 1000 steps is the length of the published curves, not a stated limit",
            "the type of GPU and the mean response length are not stated",
        ),
    )
