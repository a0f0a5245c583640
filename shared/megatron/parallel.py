"""Training a model under the current layout: Megatron's gradient buffers, pipeline schedules and optimizer.

    initialize(layout=Layout(dp=2, distributed_optimizer=True))             # in each process that torchrun started
    model = ParallelModel(config, AdamWConfig(lr=3e-4), seed=0, precision="bf16")
    result = model.train_step(microbatches, lr=1e-4)                        # StepResult(loss, grad_norm, tokens)

Losses and gradients are means over the tokens of the global batch, so no layout weighs a token differently: one
process and any layout give the same numbers (docs/parallelism.md). For losses of your own, use the parts:
`zero_grad`, then forward and backward through `chunks` (with experts: inside `token_weight` of shared.moe.layer), then
`reduce_gradients` and `step`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.distributed as dist

from shared.megatron.config import ModelConfig
from shared.megatron.init import current_layout, initialize, quiet_imports
from shared.megatron.model import build_chunks, require_positions, run_layers, token_losses
from shared.megatron.optimizer import AdamWConfig, build_optimizer, update
from shared.megatron.optimizer_state import load_optimizer_state, sharded_optimizer_state
from shared.megatron.shim import install
from shared.megatron.spec import zigzag
from shared.moe.layer import take_aux_loss, token_weight

with quiet_imports():
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.pipeline_parallel import get_forward_backward_func


@dataclass(frozen=True)
class Microbatch:
    """What one data-parallel rank sees at once, the same on all its tensor, pipeline and context-parallel ranks.

    tokens_BT, labels_BT: int64 [B, T]; labels_BT[b, t] is the token to predict at position t.
    loss_mask_BT: [B, T], 1 (or True) where a label counts, else 0. All micro-batches of a step have one shape.
    """

    tokens_BT: torch.Tensor
    labels_BT: torch.Tensor
    loss_mask_BT: torch.Tensor


@dataclass(frozen=True)
class StepResult:
    """A training step, equal on all ranks: mean loss in nats per token and gradient norm before clipping.

    Either may be infinite or NaN; with such a norm the weights were left as they were. aux_loss is the balancing loss
    of experts without its coefficient, summed over layers, None for a dense model.
    """

    loss: float
    grad_norm: float
    tokens: int
    aux_loss: float | None = None


class ParallelModel:
    """This rank's part of a model under the current layout: chunks, gradient buffers, optimizer.

    seed: of the weights; None leaves them unset, for a checkpoint or for weights written into `chunks`.
    precision: "bf16" keeps parameters and activations in bfloat16, gradients and main parameters in float32.
    """

    def __init__(
        self,
        config: ModelConfig,
        optimizer: AdamWConfig,
        *,
        seed: int | None,
        precision: Literal["fp32", "bf16"] = "fp32",
        device: torch.device | str | None = None,
        backend: Literal["local", "te"] = "local",
    ):
        self.layout, self.device, self.config = current_layout(), initialize(device), config
        install()
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self._chunks: list[GPTModel] = build_chunks(config, seed, self.device, dtype=dtype, backend=backend)
        self._wrapped: list[Any] = [self._wrap(chunk) for chunk in self._chunks]
        self._configure_schedule()
        self.optimizer = build_optimizer(optimizer, self._wrapped, _names(self._chunks))
        self._gathering = False

    def _wrap(self, chunk: GPTModel) -> DistributedDataParallel:
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=self.layout.overlap,
            overlap_param_gather=self.layout.overlap and self.layout.distributed_optimizer,
            use_distributed_optimizer=self.layout.distributed_optimizer,
        )
        return DistributedDataParallel(chunk.config, settings, chunk)

    def _configure_schedule(self) -> None:
        settings: Any = self._chunks[0].config
        settings.finalize_model_grads_func = finalize_model_grads
        if self.layout.overlap:
            waits = [chunk.no_sync for chunk in self._wrapped]
            settings.no_sync_func = waits if len(waits) > 1 else waits[0]

    @property
    def chunks(self) -> list[GPTModel]:
        """The model itself: one chunk, or `virtual_pp` of them.

        After a step with overlap and a distributed optimizer, the first look gathers the parameters: every rank takes
        it, or none. Who writes weights calls `weights_changed`.
        """
        if self._gathering:
            for chunk in self._wrapped:
                chunk.start_param_sync(force_sync=True)
            self._gathering = False
        return self._chunks

    def weights_changed(self) -> None:
        """Let the optimizer's main parameters follow weights that were written into `chunks`.

        In bfloat16 the next step would otherwise start from the old ones.
        """
        self.optimizer.reload_model_params()

    def train_step(self, microbatches: Sequence[Microbatch], lr: float) -> StepResult:
        """One update from this data-parallel rank's micro-batches. Raises `ImpossibleLayout`.

        Every rank gives the same number of micro-batches. Without a single counted token the gradient and the reported
        loss are 0, and the optimizer still steps.
        """
        self._forget_gradients()
        with token_weight(self._counted_share(microbatches) if self.config.moe else 1.0):
            loss_sum, tokens = self._run(microbatches, forward_only=False)
        grad_norm = self.step(lr)
        aux_loss = take_aux_loss(self._chunks, len(microbatches))
        return StepResult(loss_sum / max(tokens, 1.0), grad_norm, int(tokens), aux_loss)

    def _counted_share(self, microbatches: Sequence[Microbatch]) -> float:
        """Counted tokens of the global batch over all its tokens.

        Gradients are divided by the counted ones, and the balancing loss is a mean over all.
        """
        masks = [batch.loss_mask_BT for batch in microbatches]
        sums = torch.tensor(
            [sum(float(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)],
            dtype=torch.float64,
            device=self.device,
        )
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        counted, tokens = sums.tolist()
        return counted / tokens

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[Microbatch]) -> tuple[float, float]:
        """Sum of the token losses in nats and number of tokens over all data-parallel ranks."""
        training = [chunk.training for chunk in self._wrapped]
        for chunk in self._wrapped:
            chunk.eval()
        try:
            return self._run(microbatches, forward_only=True)
        finally:
            for chunk, mode in zip(self._wrapped, training, strict=True):
                chunk.train(mode)

    def _run(self, microbatches: Sequence[Microbatch], forward_only: bool) -> tuple[float, float]:
        rows, length = microbatches[0].tokens_BT.shape
        self.layout.check(self.config, length, len(microbatches))
        outputs = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=[iter(microbatches) for _ in self._wrapped],
            model=self._wrapped,
            num_microbatches=len(microbatches),
            seq_length=length,
            micro_batch_size=rows,
            forward_only=forward_only,
        )
        sums = torch.stack([torch.zeros(2, dtype=torch.float64, device=self.device), *outputs]).sum(0)
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(sums, src=last, group=cast(Any, parallel_state.get_pipeline_model_parallel_group()))
        loss_sum, tokens = sums.tolist()
        return loss_sum, tokens

    def _forward_step(self, batches: Iterator[Microbatch], wrapped: Any) -> tuple[torch.Tensor, Any]:
        batch, chunk = next(batches), wrapped.module
        require_positions(chunk, batch.tokens_BT.shape[1])
        parts = (batch.tokens_BT, batch.labels_BT, batch.loss_mask_BT)
        tokens_BT, labels_BT, mask_BT = (zigzag(part.to(self.device), 1) for part in parts)
        hidden_TBH = run_layers(chunk, tokens_BT)
        return hidden_TBH, partial(_loss, chunk, labels_BT, mask_BT)

    def _forget_gradients(self) -> None:
        for chunk in self._wrapped:
            chunk.zero_grad_buffer()
            for parameter in chunk.parameters():
                # The float32 optimizer lends the buffer to the parameter, and autograd would add to it.
                parameter.grad = None

    def zero_grad(self) -> None:
        """Forget all gradients, and collect new ones without communication until `reduce_gradients`."""
        self._forget_gradients()
        for chunk in self._wrapped:
            for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
                group.is_last_microbatch = False

    def reduce_gradients(self) -> None:
        """Sum the gradients over the data-parallel ranks: the loss was divided by its global denominator before."""
        if self.layout.overlap:
            for chunk in self._wrapped:
                chunk.start_grad_sync()
        finalize_model_grads(self._wrapped)

    def step(self, lr: float) -> float:
        """Clip and update; returns the gradient norm before clipping. Nothing changes if it is not finite."""
        self._gathering = self.layout.overlap and self.layout.distributed_optimizer
        return update(self.optimizer, lr)

    def sharded_state(self, loading: bool = False) -> dict[str, Any]:
        """Weights and optimizer state as Megatron's ShardedTensors, for `megatron.core.dist_checkpointing`.

        The names inside do not depend on the layout. `loading` makes room for state that no step has made yet.
        """
        chunks = self.chunks
        if len(chunks) == 1:
            model = {"model": chunks[0].sharded_state_dict()}
        else:
            model = {f"model{index}": chunk.sharded_state_dict() for index, chunk in enumerate(chunks)}
        return {**model, "optimizer": sharded_optimizer_state(self.optimizer, model, loading)}

    @torch.no_grad()
    def load_sharded_state(self, state: dict[str, Any]) -> None:
        """Take over what `dist_checkpointing.load(sharded_state(loading=True), ...)` returned."""
        for index, chunk in enumerate(self._chunks):
            chunk.load_state_dict(state["model" if len(self._chunks) == 1 else f"model{index}"])
        load_optimizer_state(self.optimizer, state["optimizer"])


def _loss(chunk: GPTModel, labels_BT: torch.Tensor, mask_BT: torch.Tensor, hidden_TBH: torch.Tensor) -> Any:
    losses_BT = token_losses(chunk, hidden_TBH, labels_BT)
    loss, tokens = (losses_BT * mask_BT).sum(), mask_BT.sum()
    return loss, tokens.int(), torch.stack((loss.detach().double(), tokens.double()))


def _names(chunks: Sequence[GPTModel]) -> dict[torch.Tensor, str]:
    """Parameter -> its name in the whole model, where layers count from the first stage."""
    names: dict[torch.Tensor, str] = {}
    for chunk in chunks:
        numbers = {str(index): layer.layer_number - 1 for index, layer in enumerate(cast(Any, chunk.decoder).layers)}
        for name, parameter in chunk.named_parameters():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = str(numbers[parts[2]])
            if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
                parts = ["embedding", "word_embeddings", "weight"]
            names[parameter] = ".".join(parts)
    return names
