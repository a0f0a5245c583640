"""Experts spread over processes: the same losses, gradient norms and checkpoints as one process."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shared.megatron.layout import Layout
from tests.moe.models import MODEL
from tests.ranks import run_ranks

STEPS, MICROBATCHES, ROWS, LENGTH = 4, 4, 3, 16

# One optimizer step: loss, gradient norm before clipping, counted tokens, balancing loss.
Step = tuple[float, float, int, float]


def train(rank: int, folder: str | None = None, first: int = 0, end: int = STEPS) -> list[Step]:
    """Steps `first` to `end` of one fixed batch order, from the checkpoint in `folder`, which is then replaced."""
    from megatron.core import parallel_state

    from shared.megatron.init import current_layout
    from shared.megatron.optimizer import AdamWConfig
    from shared.megatron.parallel import Microbatch, ParallelModel
    from shared.training.distributed_checkpoint import DistributedCheckpoints
    from shared.training.manifest import Contents

    optimizer = AdamWConfig(lr=1e-2)
    model = ParallelModel(MODEL, optimizer, seed=3, device="cpu")
    checkpoints = DistributedCheckpoints(Path(folder), keep=1) if folder else None
    if checkpoints and (stored := checkpoints.latest()):
        state = model.sharded_state(loading=True)
        model.load_sharded_state(checkpoints.load(stored, state, model=MODEL, precision="fp32"))
    mine = slice(parallel_state.get_data_parallel_rank(), None, parallel_state.get_data_parallel_world_size())
    steps = []
    for step in range(first, end):
        generator = torch.Generator().manual_seed(step)
        text = torch.randint(0, MODEL.vocab_size, (MICROBATCHES, ROWS, LENGTH + 1), generator=generator)[mine]
        mask = torch.ones(ROWS, LENGTH)
        result = model.train_step([Microbatch(part[:, :-1], part[:, 1:], mask) for part in text], lr=1e-2)
        steps.append((result.loss, result.grad_norm, result.tokens, result.aux_loss))
    if checkpoints:
        contents = Contents(MODEL, current_layout(), optimizer, "fp32", None, 3, end)
        checkpoints.save(end, model.sharded_state(), contents)
    return steps


def assert_equal_steps(per_rank: list[list[Step]], expected: list[Step]) -> None:
    for steps in per_rank:
        assert steps == per_rank[0]
        for step, reference in zip(steps, expected, strict=True):
            assert step == pytest.approx(reference, abs=1e-6)


@pytest.fixture(scope="module")
def one_process() -> list[Step]:
    (steps,) = run_ranks(train, Layout())
    # Clipping is at work and the loss falls, or equality with others would say little.
    assert steps[0][1] > 1
    assert steps[-1][0] < steps[0][0]
    return steps


@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp=2),
        Layout(dp=2, ep=2),
        Layout(dp=2, ep=2, distributed_optimizer=True, overlap=True, recompute="full"),
        Layout(tp=2, sequence_parallel=True),
        Layout(tp=2, ep=2, sequence_parallel=True),
        Layout(tp=2, dp=2, ep=4, sequence_parallel=True),
        Layout(cp=2, ep=2),
        Layout(pp=2, dp=2, ep=2),
    ],
    ids=str,
)
def test_any_layout_trains_like_one_process(one_process: list[Step], layout: Layout) -> None:
    assert_equal_steps(run_ranks(train, layout), one_process)


@pytest.mark.slow
@pytest.mark.parametrize("distributed", [False, True])
def test_checkpoints_move_between_expert_parallel_layouts(
    one_process: list[Step], tmp_path: Path, distributed: bool
) -> None:
    """A step each, with optimizer state, over EP1, EP2 and EP4 and back."""
    layouts = [Layout(), Layout(dp=4, ep=2), Layout(tp=2, dp=2, ep=4, sequence_parallel=True), Layout()]
    for step, layout in enumerate(layouts):
        layout = replace(layout, distributed_optimizer=distributed)
        per_rank = run_ranks(train, layout, str(tmp_path), step, step + 1)
        assert_equal_steps(per_rank, one_process[step : step + 1])


def _uneven(rank: int) -> list[list[list[float]]]:
    """Output, input gradient and expert gradient where ranks hold 5 and 0 tokens and one expert is never chosen."""
    from megatron.core import parallel_state

    from shared.moe.dispatch import apply_experts
    from shared.moe.experts import swiglu_experts
    from shared.moe.router import count_assignments

    generator = torch.Generator().manual_seed(0)
    fc1_EFH, fc2_EHI = torch.randn(4, 16, 8, generator=generator), torch.randn(4, 8, 8, generator=generator)
    tokens_TH = torch.randn(5, 8, generator=generator)
    experts_TK = torch.tensor([[0, 1], [1, 3], [3, 0], [1, 0], [1, 3]])
    group = parallel_state.get_expert_model_parallel_group()
    held = slice(0, 5) if rank == 0 else slice(0, 0)
    own = slice(2 * rank, 2 * rank + 2) if group.size() == 2 else slice(None)
    tokens_TH = tokens_TH[held].requires_grad_()
    fc1_EFH, fc2_EHI = fc1_EFH[own].clone().requires_grad_(), fc2_EHI[own]
    weights_TK = torch.full((5, 2), 0.5)[held]
    out_TH = apply_experts(
        tokens_TH,
        weights_TK,
        experts_TK[held],
        count_assignments(experts_TK[held], 4),
        lambda rows_NH, counts_E: swiglu_experts(rows_NH, counts_E, fc1_EFH, fc2_EHI),
        group,
    )
    out_TH.square().sum().backward()
    return [tensor.tolist() for tensor in (out_TH, tokens_TH.grad, fc1_EFH.grad)]


def test_a_rank_without_tokens_and_an_idle_expert() -> None:
    out_TH, grad_TH, grad_EFH = map(torch.tensor, run_ranks(_uneven, Layout())[0])
    first, second = ([torch.tensor(part) for part in rank] for rank in run_ranks(_uneven, Layout(dp=2, ep=2)))
    torch.testing.assert_close(first[0], out_TH)
    torch.testing.assert_close(first[1], grad_TH)
    torch.testing.assert_close(torch.cat((first[2], second[2])), grad_EFH)
    assert second[0].numel() == second[1].numel() == 0
    assert grad_EFH[2].count_nonzero() == 0
    assert grad_EFH[0].count_nonzero() > 0
