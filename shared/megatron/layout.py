"""How one model is spread over processes, checked before anything starts. Standard library only.

layout = Layout(tp=2, dp=2, sequence_parallel=True)
layout.check(model_config, sequence_length=1024, microbatches=4)
layout.world_size                                         # 4
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shared.experiment.contracts import AssayError
from shared.megatron.config import ModelConfig


class ImpossibleLayout(AssayError):
    """A parallel layout that the model, the batch or the number of processes does not allow."""


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism. Ranks are ordered tp fastest, then cp, dp and pp, as in Megatron.

    tp, pp, cp, dp: tensor, pipeline, context and data parallel size; their product is the number of processes.
    ep: expert parallel size; experts are dealt out inside the tp * cp * dp processes of a pipeline stage, whole (expert
        tensor parallelism is 1).
    sequence_parallel: activations between the tensor-parallel regions are split along the sequence (needs tp > 1).
    virtual_pp: model chunks per pipeline stage; more than 1 is the interleaved schedule.
    distributed_optimizer: shard optimizer state and fp32 main parameters over data-parallel ranks (ZeRO stage 1).
    overlap: overlap gradient reduction (and parameter gathering under the distributed optimizer) with computation.
    recompute: "selective" recomputes core attention in the backward pass, "full" whole layers.
    """

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1
    sequence_parallel: bool = False
    virtual_pp: int = 1
    distributed_optimizer: bool = False
    overlap: bool = False
    recompute: Literal["none", "selective", "full"] = "none"

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "cp", "dp", "ep", "virtual_pp"):
            if getattr(self, name) < 1:
                raise ImpossibleLayout(f"{name}={getattr(self, name)}: sizes start at 1")
        if self.sequence_parallel and self.tp == 1:
            raise ImpossibleLayout(
                "sequence_parallel splits over the tensor-parallel ranks: set tp > 1 or leave it off"
            )
        if self.virtual_pp > 1 and self.pp == 1:
            raise ImpossibleLayout("virtual_pp interleaves pipeline stages: set pp > 1 or virtual_pp=1")
        inside = self.tp * self.cp * self.dp
        if inside % self.ep:
            raise ImpossibleLayout(
                f"ep={self.ep} does not divide the {inside} processes of a stage (tp * cp * dp): raise dp to "
                "a multiple, or lower ep"
            )

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.tp * self.pp * self.cp * self.dp

    def __str__(self) -> str:
        """`TP2xDP2+SP` and the like; `1` for one process without options."""
        sizes = [f"{name.upper()}{getattr(self, name)}" for name in ("tp", "pp", "cp", "dp", "ep")]
        words = "x".join(size for size in sizes if not size.endswith("P1")) or "1"
        words += "+SP" if self.sequence_parallel else ""
        words += f"+VPP{self.virtual_pp}" if self.virtual_pp > 1 else ""
        words += "+distopt" if self.distributed_optimizer else ""
        words += "+overlap" if self.overlap else ""
        return words + (f"+recompute-{self.recompute}" if self.recompute != "none" else "")

    def check(self, model: ModelConfig, sequence_length: int, microbatches: int = 1) -> None:
        """Refuse what cannot run, with the fix in the sentence. `microbatches` is per data-parallel rank and step.

        Raises `ImpossibleLayout`.
        """
        self.check_model(model)
        if self.cp > 1 and sequence_length % (2 * self.cp):
            raise ImpossibleLayout(
                f"sequence_length={sequence_length} is not a multiple of 2 * cp = {2 * self.cp}, and each "
                "context-parallel rank takes two chunks: change the length or cp"
            )
        if self.sequence_parallel and sequence_length % (self.tp * self.cp):
            raise ImpossibleLayout(
                f"sequence_length={sequence_length} is not a multiple of tp * cp = {self.tp * self.cp}, which "
                "sequence_parallel needs: change the length, or switch sequence_parallel off"
            )
        if self.virtual_pp > 1 and microbatches % self.pp:
            raise ImpossibleLayout(
                f"the interleaved schedule needs a multiple of pp={self.pp} micro-batches per step, there are "
                f"{microbatches}: change the batch, or set virtual_pp=1"
            )

    def check_model(self, model: ModelConfig) -> None:
        """The part of `check` that the model alone decides. Raises `ImpossibleLayout`."""
        split = {
            "num_attention_heads": model.num_attention_heads,
            "num_query_groups": model.num_query_groups,
            "vocab_size": model.vocab_size,
        }
        if model.moe is None:  # experts are whole on their rank
            split["ffn_hidden_size"] = model.ffn_hidden_size
        for name, value in split.items():
            if value % self.tp:
                raise ImpossibleLayout(
                    f"{name}={value} is not a multiple of tp={self.tp}: lower tp, or change the model"
                )
        stages = self.pp * self.virtual_pp
        if model.num_layers % stages:
            raise ImpossibleLayout(
                f"num_layers={model.num_layers} is not a multiple of pp * virtual_pp = {stages}: choose a divisor"
            )
        experts = model.moe.num_experts if model.moe else 0
        if self.ep > 1 and not experts:
            raise ImpossibleLayout(f"ep={self.ep} needs experts, and this model is dense: set ep=1")
        if experts % self.ep:
            raise ImpossibleLayout(f"num_experts={experts} is not a multiple of ep={self.ep}: lower ep")
        if experts and self.tp > 1 and not self.sequence_parallel:
            raise ImpossibleLayout(
                f"experts under tp={self.tp} need sequence_parallel=True, or every rank would route the same tokens"
            )
