"""The places in Megatron that the shim answers are still there, and a dense model in one process does without it."""

import importlib
import inspect

import pytest
import torch

from shared.megatron import shim
from shared.megatron.layout import Layout
from tests.ranks import run_ranks


@pytest.mark.parametrize("name", shim.PLACES)
def test_every_place_still_asks_for_cuda(name):
    module = importlib.import_module(f"megatron.core.{name}")
    assert "torch" in vars(module), "the module no longer imports torch by name"
    for place in shim.PLACES[name]:
        source = inspect.getsource(getattr(module, place))
        asks = ("torch.cuda.current_device()", 'device="cuda"', "device='cuda'", "torch.cuda.synchronize()")
        assert any(ask in source for ask in asks), f"{name}.{place} no longer needs the CPU shim"


def test_the_other_answers_still_have_their_questions():
    from megatron.core import optimizer
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils

    assert "weight.data.cuda()" in inspect.getsource(LanguageModule)
    for kind in (Float16OptimizerWithFloat16Params, distrib_optimizer.DistributedOptimizer):
        assert ".type() in ['torch.cuda.HalfTensor'" in inspect.getsource(kind)
    assert "send_tensor.cuda()" in inspect.getsource(distrib_optimizer.DistributedOptimizer)
    assert "_get_cuda_rng_state(" in inspect.getsource(random.CudaRNGStatesTracker.fork)
    assert "te_general_gemm is not None" in inspect.getsource(moe_utils)
    assert isinstance(optimizer.USING_PYTORCH_OPTIMIZER, bool)
    assert isinstance(distrib_optimizer.HAVE_APEX_OR_TE, bool)
    assert isinstance(distrib_optimizer.USING_APEX_OPTIMIZER, bool)


def test_another_version_is_refused(monkeypatch):
    import megatron.core

    monkeypatch.setattr(megatron.core, "__version__", "0.17.0")
    monkeypatch.setattr(shim, "_installed", False)
    with pytest.raises(shim.UnsupportedMegatron, match=r"pip install megatron-core==0\.16\.1"):
        shim.install()


def _installed(rank: int) -> tuple[bool, bool, bool]:
    from megatron.core.pipeline_parallel import schedules

    from shared.megatron.model import build_model, forward_logits
    from shared.megatron.optimizer import AdamWConfig
    from shared.megatron.parallel import ParallelModel
    from tests.megatron.models import LLAMA

    logits_BTV = forward_logits(build_model(LLAMA, seed=0, device="cpu"), torch.zeros(1, 3, dtype=torch.int64))
    logits_BTV.sum().backward()
    dense = shim._installed
    ParallelModel(LLAMA, AdamWConfig(lr=1e-3), seed=0, device="cpu")
    return dense, shim._installed, schedules.torch is torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU nothing is replaced")
def test_one_dense_process_runs_without_the_shim():
    assert run_ranks(_installed, Layout())[0] == (False, True, False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU nothing is replaced")
def test_torch_itself_stays_as_it_is():
    cuda_type = torch.Tensor.type
    with shim.construction():
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        assert torch.zeros(1).type(torch.int64).dtype == torch.int64
        assert torch.zeros(1).cuda().device.type == "cpu"
    assert torch.Tensor.type is cuda_type
    assert torch.zeros(1).type() == "torch.FloatTensor"
    proxy = shim.cpu_torch()
    assert proxy.zeros(2, device="cuda").device.type == "cpu"
    assert proxy.cuda.current_device() == torch.device("cpu")
    assert proxy.nn is torch.nn
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(2, device="cuda")
