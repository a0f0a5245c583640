"""Tiny transformers models of every architecture that we read and write, with random weights, as folders."""

import sys
from pathlib import Path
from typing import Any

import torch
import transformers

SIZES = {
    "vocab_size": 62,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 3e-4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 60,
    "pad_token_id": 59,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Architecture -> (prefix of the transformers classes, fields beside SIZES).
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama-ungrouped": ("Llama", {"num_key_value_heads": 4}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3_moe": ("Qwen3Moe", {"head_dim": 16, "moe_intermediate_size": 24, "norm_topk_prob": False, **EXPERTS}),
    "mixtral": ("Mixtral", {**EXPERTS, "tie_word_embeddings": True}),
}


def build(architecture: str, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """A transformers model in which norms and biases are random too: as initialised, they would hide a mistake."""
    prefix, own = ARCHITECTURES[architecture]
    config = getattr(transformers, f"{prefix}Config")(**{**SIZES, **own, **fields})
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name or name.endswith(".bias"):
                    parameter.uniform_(0.5, 1.5)
    return model.to(dtype)


def save(model: Any, folder: Path, max_shard_size: str | int = "20KB") -> Path:
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the files of a folder."""
    from safetensors.torch import load_file

    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def same(a: Path, b: Path) -> None:
    """Assert that two folders hold the same tensors, bit for bit."""
    first, second = tensors(a), tensors(b)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8)), name


def make_tokenizer(folder: Path, size: int) -> Path:
    """A byte-pair tokenizer with `size` ids, the last of them an added end token, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size - 1, show_progress=False)
    tokenizer.train_from_iterator([" ".join(sys.stdlib_module_names)], trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = "{{ messages }}"
    fast.save_pretrained(folder)
    assert len(fast) == size
    return folder
