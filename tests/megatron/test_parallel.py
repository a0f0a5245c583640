"""Layouts against one process, and what ParallelModel promises beside equal numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from shared.megatron.layout import Layout
from tests.megatron.parity import CASES, DENSE, LENGTH, PAGE, Case, differences, one_process, page
from tests.ranks import run_ranks

SMALL = replace(DENSE, num_layers=2)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layouts_give_the_losses_and_gradient_norms_of_one_process(case: Case):
    loss, norm = differences(case)
    assert loss <= case.bound
    assert norm <= case.bound


def test_the_parity_table_says_what_was_just_measured():
    assert PAGE.read_text() == page(), "run python -m tests.megatron.parity"


def test_the_reference_clips_and_learns():
    """Else equality would say little about clipping and the optimizer."""
    for model in {case.model for case in CASES}:
        losses, norms, _ = one_process(model)
        assert min(norms) > 1
        assert losses[2] < losses[0] - 0.02
        assert losses[3] < losses[1] - 0.02


def _parts_of_a_step(rank: int, micro_rows: int) -> tuple[list[float], list[float]]:
    """Gradient norms and a weight, by train_step and by hand, in turn: hooks of one must not disturb the other."""
    from megatron.core import parallel_state

    from shared.megatron.model import forward_logits
    from shared.megatron.optimizer import AdamWConfig
    from shared.megatron.parallel import Microbatch, ParallelModel

    text = torch.randint(0, 64, (8, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    own = text.chunk(parallel_state.get_data_parallel_world_size())[parallel_state.get_data_parallel_rank()]
    norms, weights = [], []
    for by_hand in ((True, True, True), (False, True, False), (False, False, False)):
        model = ParallelModel(SMALL, AdamWConfig(lr=1e-2), seed=1, device="cpu")
        for hand in by_hand:
            if hand:
                model.zero_grad()
                for rows in own.split(micro_rows):
                    logits_BTV = forward_logits(model.chunks[0], rows[:, :-1])
                    loss = torch.nn.functional.cross_entropy(logits_BTV.transpose(1, 2), rows[:, 1:], reduction="sum")
                    (loss / (8 * LENGTH)).backward()
                model.reduce_gradients()
                norms.append(model.step(1e-2))
            else:
                batches = [
                    Microbatch(rows[:, :-1], rows[:, 1:], torch.ones(rows[:, 1:].shape)) for rows in own.split(2)
                ]
                norms.append(model.train_step(batches, 1e-2).grad_norm)
        weights.append(model.chunks[0].get_parameter("decoder.final_layernorm.weight").sum().item())
    return norms, weights


@pytest.mark.parametrize(
    "layout",
    [Layout(dp=2, distributed_optimizer=True, overlap=True), Layout(dp=2, overlap=True), Layout(tp=2)],
    ids=str,
)
def test_gradients_reduced_by_hand_are_those_of_train_step(layout):
    norms, weights = run_ranks(_parts_of_a_step, layout, 2)[0]
    assert norms == pytest.approx(norms[:3] * 3, rel=1e-5)
    assert weights == pytest.approx(weights[:1] * 3, rel=1e-6)


def _logits_and_gradients(rank: int, tokens_BT: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    from megatron.core import parallel_state

    from shared.megatron.model import build_model, forward_logits

    model = build_model(SMALL, seed=1, device="cpu")
    logits_BTV = forward_logits(model, tokens_BT)
    logits_BTV.square().mean().backward()
    parameters = dict(model.named_parameters())
    names = {"norm": "decoder.final_layernorm.weight", "fc2": "decoder.layers.0.mlp.linear_fc2.weight"}
    gradients = {key: parameters[name].grad for key, name in names.items()}
    if model.config.sequence_parallel:
        torch.distributed.all_reduce(gradients["norm"], group=parallel_state.get_tensor_model_parallel_group())
    return logits_BTV.detach(), gradients


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(tp=2, sequence_parallel=True)], ids=str)
@pytest.mark.parametrize("length", [LENGTH, 7])
def test_forward_logits_under_tensor_parallelism(layout, length):
    """Every rank has all logits and the gradients of its part; odd lengths are padded for sequence parallelism."""
    tokens_BT = torch.randint(0, 64, (3, length), generator=torch.Generator().manual_seed(2))
    ((logits, gradients),) = run_ranks(_logits_and_gradients, Layout(), tokens_BT)
    per_rank = run_ranks(_logits_and_gradients, layout, tokens_BT)
    for got, parts in per_rank:
        torch.testing.assert_close(got, logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(parts["norm"], gradients["norm"], rtol=1e-4, atol=1e-6)
    whole = torch.cat([parts["fc2"] for _, parts in per_rank], 1)
    torch.testing.assert_close(whole, gradients["fc2"], rtol=1e-4, atol=1e-6)


def _up_to_the_limit(rank: int) -> tuple[torch.Size, str]:
    """Shape of the logits of as many tokens as fit, 15, and what is said of 16."""
    from shared.megatron.model import build_model, forward_logits
    from shared.megatron.optimizer import AdamWConfig
    from shared.megatron.parallel import Microbatch, ParallelModel
    from shared.megatron.spec import SequenceTooLong

    model = build_model(replace(SMALL, max_sequence_length=15), seed=1, device="cpu")
    shape = forward_logits(model, torch.zeros(1, 15, dtype=torch.int64)).shape
    tokens = torch.zeros(1, 16, dtype=torch.int64)
    trained = ParallelModel(replace(SMALL, max_sequence_length=15), AdamWConfig(lr=1e-3), seed=1, device="cpu")
    with pytest.raises(SequenceTooLong, match="16 positions"):
        trained.train_step([Microbatch(tokens, tokens, tokens)], 1e-3)
    with pytest.raises(SequenceTooLong) as error:
        forward_logits(model, tokens)
    return shape, str(error.value)


def test_padding_for_sequence_parallelism_takes_no_position_from_a_sequence():
    shape, said = run_ranks(_up_to_the_limit, Layout(tp=2, sequence_parallel=True))[0]
    assert shape == (1, 15, 64)
    assert said.startswith("16 positions do not fit into max_sequence_length=15")


def _resumed(rank: int, folder: str, precision: Any, first: int) -> list[float]:
    """Train from step `first` to 3; step 2 writes a checkpoint, a start at 2 reads it."""
    from megatron.core import parallel_state

    from shared.megatron.init import current_layout
    from shared.megatron.optimizer import AdamWConfig
    from shared.megatron.parallel import Microbatch, ParallelModel
    from shared.training.distributed_checkpoint import DistributedCheckpoints
    from shared.training.manifest import Contents

    optimizer = AdamWConfig(lr=1e-2)
    model = ParallelModel(SMALL, optimizer, seed=1 + first, precision=precision, device="cpu")
    checkpoints = DistributedCheckpoints(folder)
    if stored := checkpoints.latest():
        state = model.sharded_state(loading=True)
        model.load_sharded_state(checkpoints.load(stored, state, model=SMALL, precision=precision))
    losses = []
    for step in range(first, 4):
        if step == 2 and not first:
            checkpoints.save(
                step, model.sharded_state(), Contents(SMALL, current_layout(), optimizer, precision, None, 1, 8)
            )
        text = torch.randint(0, 64, (4, LENGTH + 1), generator=torch.Generator().manual_seed(step))
        own = text.chunk(parallel_state.get_data_parallel_world_size())[parallel_state.get_data_parallel_rank()]
        batch = Microbatch(own[:, :-1], own[:, 1:], torch.ones(own[:, 1:].shape))
        losses.append(model.train_step([batch], 1e-2).loss)
    return losses[-2:]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpoints_load_with_and_without_a_distributed_optimizer(precision, tmp_path):
    kinds = {"plain": Layout(), "sharded": Layout(dp=2, distributed_optimizer=True, overlap=True)}
    for kind, other in (("plain", "sharded"), ("sharded", "plain")):
        folder = str(tmp_path / kind)
        expected = run_ranks(_resumed, kinds[kind], folder, precision, 0)[0]
        resumed = run_ranks(_resumed, kinds[other], folder, precision, 2)[0]
        assert resumed == pytest.approx(expected, abs=1e-6 if precision == "fp32" else 5e-3)


def _scaled_updates(rank: int) -> dict[str, float]:
    """Largest change of each parameter in one step under learning-rate scales, by name in the whole model."""
    from shared.megatron.optimizer import AdamWConfig, BadOptimizerConfig
    from shared.megatron.parallel import Microbatch, ParallelModel, _names

    with pytest.raises(BadOptimizerConfig, match=r"no parameter starts with 'head\.'"):
        ParallelModel(SMALL, AdamWConfig(lr=1e-3, lr_scale={"head.": 2.0}), seed=1, device="cpu")
    scales = {"embedding.": 0.0, "decoder.layers.1.": 4.0}
    model = ParallelModel(SMALL, AdamWConfig(lr=1e-3, weight_decay=0.0, lr_scale=scales), seed=1, device="cpu")
    names = {name: parameter for parameter, name in _names(model.chunks).items()}
    before = {name: parameter.detach().clone() for name, parameter in names.items()}
    text = torch.randint(0, 64, (2, LENGTH + 1), generator=torch.Generator().manual_seed(3))
    model.train_step([Microbatch(text[:, :-1], text[:, 1:], torch.ones(2, LENGTH))] * 2, 1e-3)
    return {name: (names[name] - before[name]).abs().max().item() for name in names}


def test_learning_rates_scale_by_name_on_every_pipeline_stage():
    """Adam's first step is the learning rate wherever there is a gradient; the tied head is the embedding's copy."""
    for changes in run_ranks(_scaled_updates, Layout(pp=2)):
        for name, change in changes.items():
            scale = 0.0 if name.startswith("embedding") else 4.0 if name.startswith("decoder.layers.1.") else 1.0
            assert change == pytest.approx(1e-3 * scale, rel=1e-2), name


def _step_from_zeros(rank: int) -> float:
    """Largest weight after one step from written zeros, in bfloat16."""
    from shared.megatron.optimizer import AdamWConfig
    from shared.megatron.parallel import Microbatch, ParallelModel

    model = ParallelModel(SMALL, AdamWConfig(lr=1e-3), seed=1, precision="bf16", device="cpu")
    with torch.no_grad():
        for parameter in model.chunks[0].parameters():
            parameter.zero_()
    model.weights_changed()
    tokens = torch.zeros(1, LENGTH, dtype=torch.int64)
    model.train_step([Microbatch(tokens, tokens, torch.ones(1, LENGTH))], 1e-3)
    return max(parameter.abs().max().item() for parameter in model.chunks[0].parameters())


@pytest.mark.parametrize("layout", [Layout(), Layout(dp=2, distributed_optimizer=True, overlap=True)], ids=str)
def test_written_weights_are_those_that_are_trained(layout):
    for largest in run_ranks(_step_from_zeros, layout):
        assert largest <= 1.1e-3


def _not_finite(rank: int) -> tuple[float, float, float, int, float]:
    from shared.megatron.optimizer import AdamWConfig
    from shared.megatron.parallel import Microbatch, ParallelModel

    model = ParallelModel(SMALL, AdamWConfig(lr=1e-2), seed=1, device="cpu")
    text = torch.randint(0, 64, (2, LENGTH + 1))
    batch = Microbatch(text[:, :-1], text[:, 1:], torch.ones(2, LENGTH))
    nothing = model.train_step([replace(batch, loss_mask_BT=torch.zeros(2, LENGTH))], 1e-2)
    with torch.no_grad():
        model.chunks[0].get_parameter("decoder.final_layernorm.weight")[0] = float("inf")
    before = torch.cat([parameter.flatten() for parameter in model.chunks[0].parameters()]).clone()
    result = model.train_step([batch], 1e-2)
    after = torch.cat([parameter.flatten() for parameter in model.chunks[0].parameters()])
    return result.loss, result.grad_norm, nothing.loss, nothing.tokens, float((before != after).sum())


def test_a_step_that_is_not_finite_is_reported_and_changes_nothing():
    loss, norm, empty_loss, empty_tokens, changed = run_ranks(_not_finite, Layout())[0]
    assert loss != loss
    assert norm != norm
    assert (empty_loss, empty_tokens, changed) == (0.0, 0, 0.0)


def _refusals(rank: int) -> list[str]:
    from shared.experiment.contracts import AssayError
    from shared.megatron.model import build_chunks, build_model, forward_logits
    from shared.megatron.optimizer import AdamWConfig
    from shared.megatron.parallel import Microbatch, ParallelModel

    deep = replace(DENSE, num_layers=4)
    chunk = build_chunks(deep, 0, "cpu")[0]
    batch = Microbatch(*[torch.zeros(1, LENGTH, dtype=torch.int64)] * 3)
    attempts = [
        lambda: build_model(deep, 0, "cpu"),
        lambda: forward_logits(chunk, torch.zeros(1, 4, dtype=torch.int64)),
        lambda: build_chunks(SMALL, 0, "cpu"),
        lambda: build_chunks(deep, 0, "cpu", backend="te"),
        lambda: ParallelModel(deep, AdamWConfig(lr=1e-3), seed=0, device="cpu").train_step([batch] * 3, 1e-3),
        lambda: AdamWConfig(lr=1e-3, grad_clip=-1.0),
        lambda: AdamWConfig(lr=1e-3, lr_scale={"decoder.layers.1.": 0.1, "decoder.": 0.5}),
    ]
    said = []
    for attempt in attempts:
        try:
            attempt()
        except AssayError as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def test_what_a_layout_cannot_do_is_refused_by_name():
    said = run_ranks(_refusals, Layout(pp=2, virtual_pp=2))[0]
    expected = (
        "ImpossibleLayout: virtual_pp > 1 gives every rank several models: call build_chunks",
        "ImpossibleLayout: forward_logits needs pp = cp = 1 and runs under PP2+VPP2",
        "ImpossibleLayout: num_layers=2 is not a multiple of pp * virtual_pp = 4",
        'NoTransformerEngine: backend="te" needs Transformer Engine: pip install',
        "ImpossibleLayout: the interleaved schedule needs a multiple of pp=2 micro-batches",
        "BadOptimizerConfig: grad_clip=-1.0 is negative",
        "BadOptimizerConfig: lr_scale: 'decoder.' and 'decoder.layers.1.' both scale",
    )
    assert len(said) == len(expected)
    for sentence, start in zip(said, expected, strict=True):
        assert sentence.startswith(start)


def test_rotary_angles_stay_exact_in_half_precision():
    from shared.megatron.spec import RotaryTable

    table = RotaryTable(8, 10000.0, 600)
    assert torch.equal(RotaryTable(8, 10000.0, 600).to(torch.bfloat16)(600), table(600))


def test_fused_adam_is_torchs_adamw():
    from shared.megatron.optimizer import FusedAdam

    torch.manual_seed(0)
    weights = [torch.randn(3, 5), torch.randn(7)]
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in weights] for _ in range(2))
    optimizers = [
        FusedAdam([{"params": ours[:1]}, {"params": ours[1:], "weight_decay": 0.0}], lr=0.1, weight_decay=0.3),
        torch.optim.AdamW(
            [{"params": theirs[:1]}, {"params": theirs[1:], "weight_decay": 0.0}], lr=0.1, weight_decay=0.3, fused=True
        ),
    ]
    for parameter in ours:
        optimizers[0].state[parameter] = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
    for _ in range(3):
        for optimizer, parameters in zip(optimizers, (ours, theirs), strict=True):
            optimizer.zero_grad()
            torch.stack([p.square().sum() for p in parameters]).sum().backward()
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
