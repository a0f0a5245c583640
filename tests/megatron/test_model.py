import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from shared.megatron.config import BadModelConfig
from shared.megatron.fused import Rotate, rotate
from shared.megatron.init import initialize
from shared.megatron.model import (
    AlreadyUntied,
    build_model,
    config_of,
    forward_logits,
    parameter_count,
    untie,
)
from shared.megatron.spec import CausalOnly, RMSNorm, RotaryTable, SDPACoreAttention, SequenceTooLong
from tests.megatron.models import LLAMA, randomise


def test_configurations_load_without_torch_and_models_without_noise():
    """In a fresh process, because imports happen once. Dynamo would double the time to import Megatron."""
    code = """
import sys
import shared.megatron.config
assert "torch" not in sys.modules
from shared.megatron.model import ModelConfig, build_model
build_model(ModelConfig(1, 8, 1, 1, 8, 8, 8, 8), seed=0, device="cpu")
assert sys.excepthook is sys.__excepthook__
import torch
print(torch.cuda.is_available() or "torch._dynamo" not in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("True", "")


def test_initialize_twice_keeps_the_group():
    assert initialize("cpu") == torch.device("cpu")
    group = torch.distributed.group.WORLD
    initialize("cpu")
    assert torch.distributed.group.WORLD is group
    assert torch.distributed.get_world_size() == 1


def test_torch_compile_survives_the_imports():
    assert torch.compile.__module__ == "torch"


def test_seed_decides_the_weights_and_nothing_else_does():
    torch.manual_seed(0)
    first = build_model(LLAMA, seed=5, device="cpu")
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.rand(1) == drawn, "building a model moved the global generator"
    second, other = build_model(LLAMA, seed=5, device="cpu"), build_model(LLAMA, seed=6, device="cpu")
    for (name, a), b, c in zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert "layernorm" in name or not torch.equal(a, c), name


def test_init_std():
    model = build_model(replace(LLAMA, hidden_size=128, init_std=0.05, vocab_size=500), seed=0, device="cpu")
    assert model.embedding.word_embeddings.weight.std().item() == pytest.approx(0.05, rel=0.03)
    into_residual = model.decoder.layers[0].mlp.linear_fc2.weight.std().item()
    assert into_residual == pytest.approx(0.05 / (2 * LLAMA.num_layers) ** 0.5, rel=0.05)


def test_config_survives_the_model(llama):
    assert config_of(llama) == LLAMA
    odd = replace(LLAMA, qk_layernorm=True, tie_embeddings=False, rotary_base=1e6, norm_eps=1e-6)
    assert config_of(build_model(odd, seed=0, device="cpu")) == odd


def test_parameter_count(llama):
    h, f, d, v = LLAMA.hidden_size, LLAMA.ffn_hidden_size, LLAMA.head_dim, LLAMA.vocab_size
    qkv = h * d * (LLAMA.num_attention_heads + 2 * LLAMA.num_query_groups)
    layer = qkv + h * d * LLAMA.num_attention_heads + 3 * h * f + 2 * h
    assert parameter_count(llama) == v * h + LLAMA.num_layers * layer + h
    assert parameter_count(untie(llama)) == parameter_count(llama) + v * h


def test_forward_logits_is_the_forward_pass_of_gptmodel(llama, tokens_BT):
    assert torch.equal(forward_logits(llama, tokens_BT), llama(tokens_BT, None, None))


def test_causality(llama, tokens_BT):
    changed = tokens_BT.clone()
    changed[:, 6] = (changed[:, 6] + 1) % LLAMA.vocab_size
    before, after = forward_logits(llama, tokens_BT), forward_logits(llama, changed)
    torch.testing.assert_close(before[:, :6], after[:, :6], rtol=0, atol=1e-6)
    assert (before[:, 6:] - after[:, 6:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("pad", [0, 49])
def test_right_padding_is_invisible(llama, tokens_BT, pad):
    padded = torch.nn.functional.pad(tokens_BT, (0, 9), value=pad)
    logits = forward_logits(llama, padded)[:, : tokens_BT.shape[1]]
    torch.testing.assert_close(logits, forward_logits(llama, tokens_BT), rtol=0, atol=1e-5)


def test_gradients_of_the_short_path_match_megatrons_own_attention(llama, tokens_BT):
    """RotaryAttention rotates with an autograd function of ours; Megatron's path is the oracle."""
    grads = []
    for oracle in (False, True):
        for layer in llama.decoder.layers:
            # This flag sends training through Megatron's code, and has no effect there in eval mode.
            layer.self_attention.checkpoint_core_attention = oracle
        llama.eval()
        loss = forward_logits(llama, tokens_BT).log_softmax(-1)[..., 3].sum()
        grads.append(torch.autograd.grad(loss, list(llama.parameters())))
        llama.train()
    for layer in llama.decoder.layers:
        layer.self_attention.checkpoint_core_attention = False
    for (name, _), ours, theirs in zip(llama.named_parameters(), *grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, msg=name)


def test_rotation_has_right_derivatives_of_both_orders():
    x = torch.randn(3, 2, 2, 6, dtype=torch.float64, requires_grad=True)
    freqs = RotaryTable(6, 100.0, 5)(3).double()
    cos, sin = freqs.cos(), freqs.sin()
    assert torch.autograd.gradcheck(lambda x: Rotate.apply(x, cos, sin), x)
    assert torch.autograd.gradgradcheck(lambda x: Rotate.apply(x, cos, sin), x)


def test_rotated_dot_products_depend_on_the_distance_alone():
    freqs = RotaryTable(8, 100.0, 20)(20)
    cos, sin = freqs.cos(), freqs.sin()
    query, key = torch.randn(2, 1, 1, 1, 8).expand(2, 20, 1, 1, 8)
    scores = (rotate(query, cos, sin).squeeze() @ rotate(key, cos, sin).squeeze().T).tolist()
    for i in range(19):
        for j in range(19):
            assert scores[i][j] == pytest.approx(scores[i + 1][j + 1], abs=1e-5)
    assert abs(scores[0][0] - scores[0][3]) > 1e-3


def test_too_long_sequence_is_named(llama):
    forward_logits(llama, torch.zeros(1, LLAMA.max_sequence_length, dtype=torch.int64))
    with pytest.raises(SequenceTooLong, match="41 positions do not fit into max_sequence_length=40"):
        forward_logits(llama, torch.zeros(1, LLAMA.max_sequence_length + 1, dtype=torch.int64))


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(BadModelConfig, match="num_attention_heads=4 is not a multiple of num_query_groups=3"):
        replace(LLAMA, num_query_groups=3)
    with pytest.raises(BadModelConfig, match="head_dim=7 is odd"):
        replace(LLAMA, head_dim=7)


def test_untie_keeps_the_logits_and_frees_the_head(llama, tokens_BT):
    free = untie(llama)
    assert torch.equal(forward_logits(free, tokens_BT), forward_logits(llama, tokens_BT))
    with torch.no_grad():
        free.output_layer.weight.add_(1)
        free.decoder.layers[0].mlp.linear_fc1.weight.zero_()
    assert not torch.equal(free.output_layer.weight, free.embedding.word_embeddings.weight)
    assert llama.decoder.layers[0].mlp.linear_fc1.weight.any(), "the copy shares memory with the original"
    with pytest.raises(AlreadyUntied, match=r"load its state_dict\(\) into build_model\(config_of\(model\), seed=0\)"):
        untie(free)
    copy = build_model(config_of(free), seed=0, device="cpu")
    copy.load_state_dict(free.state_dict())
    assert torch.equal(forward_logits(copy, tokens_BT), forward_logits(free, tokens_BT))


def test_rms_norm_formula():
    norm = RMSNorm(build_model(LLAMA, seed=0, device="cpu").config, 32, eps=1e-3)
    x = torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(32, dtype=torch.float64, requires_grad=True)
    norm.weight = torch.nn.Parameter(weight.detach().clone())
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn(5, 32, dtype=torch.float64)
    want = torch.autograd.grad(expected, [x, weight], cotangent)
    got = torch.autograd.grad(norm(x), [x, norm.weight], cotangent)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("heads", [2, 4])
def test_attention_with_a_cache_equals_the_end_of_full_attention(llama, heads):
    attention = SDPACoreAttention(llama.config)
    query, key, value = torch.randn(9, 3, heads, 8), torch.randn(9, 3, 2, 8), torch.randn(9, 3, 2, 8)
    full = attention(query, key, value, None)
    for new in (1, 4):
        torch.testing.assert_close(attention(query[-new:], key, value, None), full[-new:], rtol=0, atol=1e-6)


def test_a_mask_is_refused_by_name(llama, tokens_BT):
    with pytest.raises(CausalOnly, match="pass None for mask"):
        llama(tokens_BT, None, torch.ones(1, 1, 11, 11, dtype=torch.bool))


def test_norms_are_marked_for_sequence_parallel_gradients(llama):
    marks = {p.sequence_parallel for name, p in randomise(llama).named_parameters() if "layernorm" in name}
    assert marks == {False}
