"""The native engine against GPTModel's own forward pass."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.engines.contracts import BadRequest, BadWeights, Sampling, SelfCheckFailed, UnsupportedModel
from shared.engines.native import NativeEngine, _pick, _uniforms
from shared.megatron.model import ModelConfig, build_model, forward_logits, untie
from tests.megatron.models import randomise

VOCAB = 13
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [4, 4]]
PLAIN = ModelConfig(2, 16, 2, 2, 8, 24, VOCAB, 48, init_std=0.4)
GROUPED = ModelConfig(2, 16, 4, 2, 8, 24, VOCAB, 48, qk_layernorm=True, tie_embeddings=False, init_std=0.4)


def build(config, eos_id=0, seed=0):
    return NativeEngine(randomise(build_model(config, seed, device="cpu"), seed), eos_id=eos_id, pad_id=0)


@pytest.fixture(scope="module", params=[PLAIN, GROUPED], ids=["plain", "grouped-qk-norm-untied"])
def engine(request):
    return build(request.param)


@pytest.fixture(scope="module")
def plain():
    return build(PLAIN)


def rows(rollouts):
    """(tokens, log-probabilities) of every row without padding."""
    lengths = rollouts.lengths_N.tolist()
    return [(rollouts.tokens_NT[i, :k].tolist(), rollouts.logprobs_NT[i, :k]) for i, k in enumerate(lengths)]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("greedy", [False, True])
def test_logprobs_are_those_of_the_forward_pass(engine, temperature, greedy):
    rollouts = engine.generate(PROMPTS, Sampling(20, temperature=temperature, greedy=greedy), n=3, seed=1)
    for row, (tokens, logprobs) in enumerate(rows(rollouts)):
        prompt = PROMPTS[row // 3]
        logits = forward_logits(engine.model, torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1]
        expected = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(tokens)[:, None]).squeeze(1)
        torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9), min_size=1, max_size=5),
    n=st.integers(1, 3),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    seed=st.integers(0, 9),
)
def test_any_batch_has_the_logprobs_of_the_forward_pass(engine, prompts, n, temperature, seed):
    rollouts = engine.generate(prompts, Sampling(8, temperature=temperature), n=n, seed=seed)
    assert len(rollouts.lengths_N) == len(prompts) * n
    for row, (tokens, logprobs) in enumerate(rows(rollouts)):
        prompt = prompts[row // n]
        logits = forward_logits(engine.model, torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1]
        expected = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(tokens)[:, None]).squeeze(1)
        torch.testing.assert_close(logprobs, expected, rtol=0, atol=2e-5)


def test_greedy_tokens_are_the_argmax_without_a_cache(engine):
    rollouts = engine.generate(PROMPTS, Sampling(15, greedy=True), n=2, seed=0)
    for row, (tokens, _) in enumerate(rows(rollouts)):
        sequence = list(PROMPTS[row // 2])
        for token in tokens:
            assert token == forward_logits(engine.model, torch.tensor([sequence]))[0, -1].argmax().item()
            sequence.append(token)


def test_form_of_the_rollouts(engine):
    rollouts = engine.generate(PROMPTS, Sampling(12, temperature=2.0), n=8, seed=3)
    count, longest = rollouts.tokens_NT.shape
    assert count == 32
    assert longest == rollouts.lengths_N.max()
    assert rollouts.tokens_NT.dtype == rollouts.lengths_N.dtype == torch.int64
    assert rollouts.logprobs_NT.dtype == torch.float32
    assert rollouts.prompt_lengths_N.tolist() == [len(p) for p in PROMPTS for _ in range(8)]
    assert set(rollouts.finish_reason_N) == {"stop", "length"}
    for row, reason in enumerate(rollouts.finish_reason_N):
        length = int(rollouts.lengths_N[row])
        tokens = rollouts.tokens_NT[row].tolist()
        assert 0 not in tokens[: length - 1], "went on after the end token"
        assert (tokens[length - 1] == 0) == (reason == "stop")
        assert reason == "stop" or length == 12
        assert not any(tokens[length:])
        assert not rollouts.logprobs_NT[row, length:].any()
        assert (rollouts.logprobs_NT[row, :length] < 0).all()


def test_pad_differs_from_eos():
    engine = build(PLAIN, eos_id=3)
    engine.pad_id = 11
    rollouts = engine.generate(PROMPTS, Sampling(12, temperature=2.0), n=4, seed=3)
    for row, length in enumerate(rollouts.lengths_N.tolist()):
        assert set(rollouts.tokens_NT[row, length:].tolist()) <= {11}


def test_same_seed_same_output_and_other_seed_other_output(engine):
    first, again, other = (engine.generate(PROMPTS, Sampling(10), n=4, seed=s) for s in (5, 5, 6))
    assert torch.equal(first.tokens_NT, again.tokens_NT)
    assert torch.equal(first.logprobs_NT, again.logprobs_NT)
    assert [r[0] for r in rows(first)] != [r[0] for r in rows(other)]


@pytest.mark.parametrize(
    "batch",
    [PROMPTS[::-1], PROMPTS[:2], PROMPTS[3:], [[12] * 20, *PROMPTS, [1]]],
    ids=["permuted", "split", "alone", "with a longer neighbour"],
)
def test_responses_do_not_depend_on_the_batch(engine, batch):
    sampling = Sampling(16, temperature=1.5)
    together = rows(engine.generate(PROMPTS, sampling, n=3, seed=9))
    apart = rows(engine.generate(batch, sampling, n=3, seed=9))
    for i, prompt in enumerate(batch):
        if prompt not in PROMPTS:
            continue
        for sample in range(3):
            tokens, logprobs = apart[3 * i + sample]
            expected_tokens, expected_logprobs = together[3 * PROMPTS.index(prompt) + sample]
            assert tokens == expected_tokens
            torch.testing.assert_close(logprobs, expected_logprobs, rtol=0, atol=2e-6)


def test_more_samples_keep_the_first_ones_and_repeated_prompts_go_on_counting(plain):
    few = rows(plain.generate([[1, 2]], Sampling(12), n=2, seed=0))
    many = rows(plain.generate([[1, 2]], Sampling(12), n=4, seed=0))
    twice = rows(plain.generate([[1, 2], [1, 2]], Sampling(12), n=2, seed=0))
    assert [r[0] for r in few] == [r[0] for r in many[:2]]
    assert [r[0] for r in twice] == [r[0] for r in many]


def test_sampled_frequencies_match_the_softmax(plain):
    n, temperature = 6000, 0.8
    rollouts = plain.generate([[1, 2, 3]], Sampling(1, temperature=temperature), n=n, seed=0)
    probs = (forward_logits(plain.model, torch.tensor([[1, 2, 3]]))[0, -1] / temperature).softmax(-1)
    counts = torch.bincount(rollouts.tokens_NT[:, 0], minlength=VOCAB)
    likely = probs * n >= 5
    expected = torch.cat((probs[likely], probs[~likely].sum()[None])) * n
    seen = torch.cat((counts[likely], counts[~likely].sum()[None]))
    statistic = ((seen - expected) ** 2 / expected.clamp(min=1e-9)).sum().item()
    assert likely.sum() >= 5
    # The 99.99 % quantile of chi-square with 12 degrees of freedom, the most there can be here.
    assert statistic < 39.1


def test_a_token_of_probability_zero_is_never_drawn(plain):
    model = untie(plain.model)
    with torch.no_grad():
        model.output_layer.weight.mul_(100)
        possible = forward_logits(model, torch.tensor([[1]]))[0, -1].softmax(-1) > 0
    assert 1 < possible.sum() < VOCAB
    rollouts = NativeEngine(model, eos_id=0, pad_id=0).generate([[1]], Sampling(1), n=2000, seed=0)
    assert possible[rollouts.tokens_NT[:, 0]].all()


def test_inverse_cdf_at_its_ends():
    """The smallest and the largest uniform, between tokens of probability zero."""
    logits_BV = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]]).expand(2, -1)
    token_B, logprob_B = _pick(logits_BV, Sampling(1), torch.tensor([0.0, 1 - 2.0**-52], dtype=torch.float64))
    assert token_B.tolist() == [1, 3]
    torch.testing.assert_close(logprob_B, logits_BV[0].log_softmax(-1)[token_B])


def test_updates_in_place_are_seen_without_a_reload(plain):
    model = untie(plain.model)
    engine = NativeEngine(model, eos_id=0, pad_id=0)
    before = engine.generate(PROMPTS, Sampling(6, greedy=True), n=1, seed=0)
    with torch.no_grad():
        model.output_layer.weight.neg_()
    after = engine.generate(PROMPTS, Sampling(6, greedy=True), n=1, seed=0)
    assert not torch.equal(before.tokens_NT[:, 0], after.tokens_NT[:, 0])
    engine.self_check()


def snapshot(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_load_weights_takes_over_every_tensor(engine):
    tied = engine.model.share_embeddings_and_output_weights
    fresh = build(PLAIN if tied else GROUPED, seed=7)
    fresh.load_weights(snapshot(engine.model).items())
    ours, theirs = (e.generate(PROMPTS, Sampling(9), n=2, seed=0) for e in (fresh, engine))
    assert torch.equal(ours.tokens_NT, theirs.tokens_NT)
    assert torch.equal(ours.logprobs_NT, theirs.logprobs_NT)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w: w.pop("decoder.final_layernorm.weight"), "missing .*decoder.final_layernorm.weight"),
        (lambda w: w.update({"lm_head.weight": torch.zeros(1)}), "unknown .*lm_head.weight"),
        (
            lambda w: w.update({"decoder.final_layernorm.weight": torch.ones(3)}),
            r"final_layernorm.weight has shape \(3,\)",
        ),
        (lambda w: w["decoder.final_layernorm.weight"].fill_(float("nan")), "final_layernorm.weight holds NaN"),
    ],
    ids=["missing", "unknown", "shape", "nan"],
)
def test_load_weights_refuses_by_name_and_changes_nothing(plain, spoil, message):
    before = snapshot(plain.model)
    weights = {name: tensor + 1 for name, tensor in before.items()}
    spoil(weights)
    with pytest.raises(BadWeights, match=message):
        plain.load_weights(weights.items())
    for name, parameter in plain.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_self_check_catches_a_model_that_is_not_its_parameters(plain):
    model = untie(plain.model)
    engine = NativeEngine(model, eos_id=0, pad_id=0)
    engine.self_check()
    handle = model.decoder.final_layernorm.register_forward_hook(lambda module, args, out: out * 1.5)
    model.decoder.layers[0].mlp.linear_fc1.register_forward_hook(lambda module, args, out: (out[0] * 1.5, out[1]))
    with pytest.raises(SelfCheckFailed, match="differ by"):
        engine.load_weights(snapshot(model).items())
    handle.remove()


def test_unknown_layer_is_named():
    model = build_model(PLAIN, seed=0, device="cpu")
    model.decoder.layers[1].mlp = torch.nn.Identity()
    with pytest.raises(UnsupportedModel, match="layer 1 has a mlp"):
        NativeEngine(model, eos_id=0, pad_id=0)


@pytest.mark.parametrize(
    ("prompts", "n", "message"),
    [
        ([], 1, "0 prompts"),
        ([[1]], 0, "n=0"),
        ([[1], []], 1, "prompt 1 is empty"),
        ([[1, VOCAB]], 1, "prompt 0 .* outside 0..12"),
        ([[1] * 45], 1, "prompt 0 has 45 tokens.*max_sequence_length=48"),
    ],
)
def test_bad_requests_are_named(plain, prompts, n, message):
    with pytest.raises(BadRequest, match=message):
        plain.generate(prompts, Sampling(4), n=n, seed=0)


@pytest.mark.parametrize("wrong", [{"max_new_tokens": 0}, {"temperature": 0.0}, {"temperature": float("nan")}])
def test_bad_sampling_is_named(wrong):
    with pytest.raises(BadRequest, match=str(next(iter(wrong.values())))):
        Sampling(**{"max_new_tokens": 4, **wrong})


def test_the_longest_request_fits(plain):
    rollouts = plain.generate([[1] * 44], Sampling(4, greedy=True), n=1, seed=0)
    assert rollouts.prompt_lengths_N.tolist() == [44]


def test_generation_leaves_the_graph_and_the_generator_alone(plain):
    state = torch.get_rng_state()
    rollouts = plain.generate(PROMPTS, Sampling(3), n=1, seed=0)
    assert torch.equal(state, torch.get_rng_state())
    weight = torch.ones(rollouts.logprobs_NT.shape, requires_grad=True)
    (weight * rollouts.logprobs_NT / rollouts.lengths_N[:, None]).sum().backward()


@settings(max_examples=30, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 300), min_size=1, max_size=5), min_size=1, max_size=4, unique_by=tuple),
    seed=st.integers(-(2**70), 2**70),
)
def test_uniforms_are_in_range_distinct_and_local(prompts, seed):
    keys = [tuple(p) for p in prompts]
    uniform = _uniforms(keys, 3, 5, seed)
    assert ((uniform >= 0) & (uniform < 1)).all()
    assert len(set(uniform.ravel().tolist())) == uniform.size
    assert (_uniforms(keys[-1:], 2, 4, seed) == uniform[-3:-1, :4]).all()
    assert not (_uniforms(keys, 3, 5, seed + 1) == uniform).any()


def test_uniforms_are_uniform_and_uncorrelated():
    from scipy import stats

    uniform = _uniforms([(k,) for k in range(40)], 16, 32, seed=0)
    assert stats.kstest(uniform.ravel(), "uniform").pvalue > 1e-3
    for a, b in (
        (uniform[:, :-1], uniform[:, 1:]),
        (uniform[:-1], uniform[1:]),
        (uniform[:-16], uniform[16:]),
    ):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / a.size**0.5
