"""What megatron-core 0.16.1 takes for granted, answered where it is not so: CUDA, Transformer Engine or Apex.

`install()` is called by `initialize` for several processes and by `ParallelModel`; calling it again is free. torch
itself stays as it is: on a machine without CUDA the Megatron modules of `PLACES` get a `torch` of their own, in which
"cuda" and the current CUDA device mean the CPU. A dense model in one process never needs any of it.

Line numbers are those of 0.16.1. Another version is refused, and a test checks that each place is still as expected.
"""

from __future__ import annotations

import contextlib
import importlib
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from shared.experiment.contracts import AssayError
from shared.megatron.init import quiet_imports

VERSION = "0.16.1"

# Module of megatron.core -> functions in it that name CUDA and are reached by what we run.
PLACES: dict[str, tuple[str, ...]] = {
    # :91-181, buffers of gathers and scatters
    "tensor_parallel.mappings": ("_gather_along_first_dim", "_reduce_scatter_along_first_dim"),
    # :552, gradient of a sequence-parallel input
    "tensor_parallel.layers": ("LinearWithGradAccumulationAndAsyncCommunication",),
    # :313-321, receive buffers; :398, synchronize after a batch of sends
    "pipeline_parallel.p2p_communication": ("P2PCommunicator",),
    # :596, :983, :2138, the token count of a step
    "pipeline_parallel.schedules": (
        "forward_backward_no_pipelining",
        "forward_backward_pipelining_with_interleaving",
        "forward_backward_pipelining_without_interleaving",
    ),
    # :800, :806, the buffers themselves
    "distributed.param_and_grad_buffer": ("_ParamAndGradBuffer",),
    # :481, :485, :907, scale and overflow tensors
    "optimizer.optimizer": ("MixedPrecisionOptimizer", "FP32Optimizer"),
    # :791, :1077, optimizer state while a checkpoint loads
    "optimizer.distrib_optimizer": ("DistributedOptimizer",),
    # :90-115, the norm and its overflow tensor
    "optimizer.clip_grads": ("get_grad_norm_fp32",),
    # :1207, norm of many tensors where Apex is absent
    "utils": ("local_multi_tensor_l2_norm",),
    # :230, synchronize before writing
    "dist_checkpointing.strategies.filesystem_async": ("FileSystemWriterAsync",),
    # :204, :252, agreement of the ranks about a save
    "dist_checkpointing.strategies.state_dict_saver": ("verify_global_md_reuse", "save_state_dict_async_finalize"),
}

_FACTORIES = ("empty", "empty_like", "full", "ones", "ones_like", "tensor", "zeros", "zeros_like")

_installed = False


class UnsupportedMegatron(AssayError):
    """Another version of megatron-core than the one whose internals are known here."""


def install() -> None:
    """Prepare Megatron for this machine. Raises `UnsupportedMegatron`."""
    global _installed
    if _installed:
        return
    with quiet_imports():
        import megatron.core
        from megatron.core.tensor_parallel import random
        from megatron.core.transformer.moe import moe_utils
    if megatron.core.__version__ != VERSION:
        raise UnsupportedMegatron(
            f"megatron-core {megatron.core.__version__} is installed and {VERSION} is needed: "
            f"pip install megatron-core=={VERSION}"
        )
    if not hasattr(moe_utils, "te_general_gemm"):
        # moe_utils.py:1192 and :1225 ask `te_general_gemm is not None`, and its import (:34) fails without
        # Transformer Engine, on GPUs as well.
        moe_utils.te_general_gemm = None  # pyright: ignore[reportAttributeAccessIssue]
    _use_own_adam()
    # Megatron calls collectives by names that torch 2.13 calls old, once in each step and rank.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        proxy = cpu_torch()
        for name in PLACES:
            importlib.import_module(f"megatron.core.{name}").torch = proxy  # pyright: ignore[reportAttributeAccessIssue]
        # random.py:40 and :70: recomputation and sequence parallelism keep and fork the generator of the device.
        random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
        random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    _register_generators(device)
    _installed = True


def cpu_torch() -> types.ModuleType:
    """A module that is torch, except that "cuda" and the current CUDA device are the CPU."""
    cuda: Any = _Overlay(torch.cuda)
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = lambda *_: None
    overlay: Any = _Overlay(torch)
    overlay.cuda = cuda
    for name in _FACTORIES:
        setattr(overlay, name, _on_cpu(getattr(torch, name)))
    return overlay


class _Overlay(types.ModuleType):
    """A module whose missing attributes are those of another one."""

    def __init__(self, below: types.ModuleType):
        super().__init__(below.__name__)
        self._below = below

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_below"], name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def made(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs and str(kwargs["device"]).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return made


@contextlib.contextmanager
def construction() -> Iterator[None]:
    """Inside, tensors on a CPU pass for tensors on a GPU where Megatron's constructors ask; a no-op with CUDA.

    language_module.py:244 calls `.cuda()` on tied embeddings, and the optimizers ask for the legacy name of a type:
    optimizer.py:671 and :690, distrib_optimizer.py:361, :420 and :582.
    """
    if torch.cuda.is_available():
        yield
        return
    type_ = torch.Tensor.type

    def cuda_type(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = type_(tensor, *args, **kwargs)
        return name.replace("torch.", "torch.cuda.") if isinstance(name, str) else name

    tensor_class: Any = torch.Tensor
    tensor_class.type, tensor_class.cuda = cuda_type, lambda tensor, *_, **__: tensor
    try:
        yield
    finally:
        del tensor_class.type, tensor_class.cuda


def _use_own_adam() -> None:
    """Give the distributed optimizer an AdamW with Apex's contract where neither Apex nor Transformer Engine is.

    Its state with torch's AdamW can be saved but not loaded: distrib_optimizer.py:642 and :940.
    """
    with quiet_imports():
        from megatron.core import optimizer
        from megatron.core.optimizer import distrib_optimizer

    from shared.megatron.optimizer import FusedAdam

    if optimizer.USING_PYTORCH_OPTIMIZER:
        optimizer.Adam = distrib_optimizer.Adam = FusedAdam
        optimizer.USING_PYTORCH_OPTIMIZER = False
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True


def _register_generators(device: str) -> None:
    """random.py:245 refuses to fork a generator that was never registered; without dropout nothing draws from it."""
    from megatron.core.tensor_parallel import random

    tracker: Any = random.get_cuda_rng_tracker()
    if not tracker.is_initialized():
        names = (
            random._MODEL_PARALLEL_RNG_TRACKER_NAME,
            random.get_expert_parallel_rng_tracker_name(),
            random.get_data_parallel_rng_tracker_name(),
        )
        tracker.set_states({name: torch.Generator(device=device).manual_seed(0).get_state() for name in names})
