"""Transformers' own Llama and Qwen3 are the oracle for the whole model: logits, gradients, greedy generation."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from shared.engines.contracts import Sampling
from shared.engines.native import NativeEngine
from shared.megatron.hf import (
    UnsupportedArchitecture,
    WeightsDoNotFit,
    config_from_hf,
    from_hf,
    to_hf_config,
    to_hf_state_dict,
)
from shared.megatron.model import build_model, forward_logits
from tests.megatron.models import randomise

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 3e-4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 60,
    "pad_token_id": 59,
}
CASES = {
    "llama-tied": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-grouped": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 2, "tie_word_embeddings": False}),
    "qwen3-tied": (Qwen3Config, Qwen3ForCausalLM, {"num_key_value_heads": 1, "head_dim": 10}),
    "qwen3-untied": (Qwen3Config, Qwen3ForCausalLM, {"num_key_value_heads": 2, "head_dim": 8}),
}


@pytest.fixture(scope="module", params=CASES)
def reference(request):
    """A transformers model with random weights, norms included."""
    config_class, model_class, fields = CASES[request.param]
    tied = {"tie_word_embeddings": request.param == "qwen3-tied"} | fields
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = model_class(config_class(**{**SIZES, **tied})).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def ours(reference):
    return from_hf(reference.config, reference.state_dict(), device="cpu")


@pytest.fixture(scope="module")
def tokens_BT():
    return torch.randint(0, 59, (3, 17), generator=torch.Generator().manual_seed(0))


def test_logits_equal_transformers(reference, ours, tokens_BT):
    with torch.no_grad():
        expected = reference(tokens_BT).logits
        got = forward_logits(ours, tokens_BT)
    assert expected.std() > 0.3
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_gradients_equal_transformers(reference, ours, tokens_BT):
    def loss(logits):
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())

    reference.zero_grad()
    ours.zero_grad()
    loss(reference(tokens_BT).logits).backward()
    loss(forward_logits(ours, tokens_BT)).backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    # The export of a model whose weights are our gradients names and splits the gradients.
    gradients = build_model(config_from_hf(reference.config), seed=0, device="cpu")
    with torch.no_grad():
        for parameter, trained in zip(gradients.parameters(), ours.parameters(), strict=True):
            parameter.copy_(trained.grad)
    got = to_hf_state_dict(gradients)
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_export_returns_what_was_imported(reference, ours):
    exported = to_hf_state_dict(ours)
    original = dict(reference.named_parameters())
    assert exported.keys() == original.keys()
    for name, tensor in exported.items():
        assert torch.equal(tensor, original[name]), name


def test_a_model_of_ours_runs_in_transformers(reference, tokens_BT):
    model = randomise(build_model(config_from_hf(reference.config), seed=3, device="cpu"))
    config = to_hf_config(model)
    assert config_from_hf(config) == config_from_hf(reference.config)
    theirs = type(reference)(config).eval()
    missing, unexpected = theirs.load_state_dict(to_hf_state_dict(model), strict=False)
    assert missing == (["lm_head.weight"] if config.tie_word_embeddings else [])
    assert not unexpected
    with torch.no_grad():
        got = theirs(tokens_BT).logits
        torch.testing.assert_close(got, forward_logits(model, tokens_BT), rtol=0, atol=1e-5)


def test_greedy_tokens_equal_transformers_generate(reference, ours):
    prompts = [[5, 6, 7], [1], [9, 8, 7, 6, 5]]
    rollouts = NativeEngine(ours, eos_id=60, pad_id=59).generate(prompts, Sampling(20, greedy=True), n=1, seed=0)
    for row, prompt in enumerate(prompts):
        expected = reference.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, len(prompt) :]
        assert rollouts.tokens_NT[row, : rollouts.lengths_N[row]].tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "mistral"),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("attention_dropout", 0.1),
        ("use_sliding_window", True),
        ("sliding_window", 16),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("quantization_config", {"quant_method": "fp8"}),
        ("rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
        ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 1e4}),
    ],
)
def test_unsupported_fields_are_named(field, value):
    class Loaded(LlamaConfig):
        def to_dict(self):
            return super().to_dict() | {field: value}

    with pytest.raises(UnsupportedArchitecture, match=f"cannot represent .*{field.removeprefix('rope_parameters')}"):
        config_from_hf(Loaded(**SIZES))


def test_a_rope_scaling_from_a_real_config_is_refused():
    scaled = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32, "rope_theta": 5e5}
    scaled |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    with pytest.raises(UnsupportedArchitecture, match="llama3"):
        config_from_hf(LlamaConfig(**{**SIZES, "rope_parameters": scaled}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), "missing .*model.norm.weight"),
        (lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}), "unknown .*q_proj.bias"),
        (lambda w: w.update({"model.norm.weight": torch.ones(31)}), r"model.norm.weight .* \(31,\)"),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}),
            "model.norm.weight is torch.int8",
        ),
        (lambda w: w.update({"lm_head.weight": torch.zeros(61, 32)}), "lm_head.weight differs"),
    ],
    ids=["missing", "unknown", "shape", "quantised", "head of a tied model"],
)
def test_weights_that_do_not_fit_are_named(spoil, message):
    config = LlamaConfig(**SIZES, tie_word_embeddings=True)
    weights = dict(LlamaForCausalLM(config).state_dict())
    spoil(weights)
    with pytest.raises(WeightsDoNotFit, match=message):
        from_hf(config, weights, device="cpu")
