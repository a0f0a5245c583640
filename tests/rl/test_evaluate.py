"""Evaluation against a policy with known entropy and a recount by hand."""

import math

import pytest
import torch

from shared.data.tasks import get_task
from shared.engines.contracts import Sampling
from shared.engines.native import NativeEngine
from shared.megatron.model import ModelConfig, build_model, forward_logits
from shared.rl.evaluate import evaluate_policy, pad_sequences, response_entropy

TASK = get_task("plain_countdown")
CONFIG = ModelConfig(1, 16, 2, 1, 8, 24, TASK.vocab_size, 32, init_std=0.3)
PROBLEMS = TASK.problems("eval", 20, seed=0)


class Lenient:
    """The task with a verdict that a random policy meets: the response begins with a digit."""

    def __getattr__(self, name):
        return getattr(TASK, name)

    def verify(self, problem, response_ids):
        verdict = TASK.verify(problem, response_ids)
        return type(verdict)(TASK.render(response_ids[:1]).isdigit(), verdict.reason)


@pytest.fixture(scope="module")
def model():
    return build_model(CONFIG, seed=0)


def test_uniform_policy_has_the_entropy_of_the_vocabulary():
    model = build_model(CONFIG, seed=0)
    torch.nn.init.zeros_(model.embedding.word_embeddings.weight)
    result = evaluate_policy(model, TASK, PROBLEMS, n=16, seed=0)
    assert result["entropy"] == pytest.approx(math.log(21), abs=1e-5)
    # eos with probability 1/21 per token, at most 18 tokens
    stop_late = (20 / 21) ** TASK.max_response_len
    assert result["truncated"] == pytest.approx(stop_late, abs=0.1)
    assert result["length_mean"] == pytest.approx(21 * (1 - stop_late), rel=0.1)
    assert result["pass@1"] == 0.0


def test_metrics_agree_with_a_recount(model):
    result = evaluate_policy(model, Lenient(), PROBLEMS, n=4, seed=3, temperature=0.7)
    sampling = Sampling(TASK.max_response_len, temperature=0.7)
    prompts = [TASK.prompt(problem) for problem in PROBLEMS]
    rollouts = NativeEngine(model, TASK.eos_id, TASK.pad_id).generate(prompts, sampling, 4, 3)
    hits, entropies = [], []
    for i, row in enumerate(rollouts.tokens_NT.tolist()):
        response = row[: int(rollouts.lengths_N[i])]
        hits.append(TASK.render(response[:1]).isdigit())
        logits_TV = forward_logits(model, torch.tensor([prompts[i // 4] + response]))[0]
        p_TV = (logits_TV[len(prompts[i // 4]) - 1 : -1].double() / 0.7).softmax(-1)
        entropies += (-(p_TV * p_TV.log()).sum(-1)).tolist()
    assert 0.1 < sum(hits) / len(hits) < 0.9
    assert result["pass@1"] == pytest.approx(sum(hits) / len(hits))
    assert result["pass@4"] == pytest.approx(sum(any(hits[i : i + 4]) for i in range(0, 80, 4)) / 20)
    assert result["entropy"] == pytest.approx(sum(entropies) / len(entropies), abs=1e-5)
    assert result["length_mean"] == pytest.approx(len(entropies) / 80)
    assert evaluate_policy(model, Lenient(), PROBLEMS, n=4, seed=3, temperature=0.7) == result


def test_entropy_ignores_padding_and_prompts(model):
    rows, lengths = [[1, 4, 5, 6, 7], [1, 4, 5, 2]], torch.tensor([2, 3])
    together = response_entropy(model, rows, lengths, TASK.pad_id)
    apart = [response_entropy(model, [row], lengths[i : i + 1], TASK.pad_id) for i, row in enumerate(rows)]
    assert together.shape == (4,)
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-6, rtol=0)


def test_pad_sequences_marks_the_response():
    tokens_BL, response_BL = pad_sequences([[1, 8, 9], [1, 8, 9, 9, 2]], [2, 3], pad_id=0)
    assert tokens_BL.tolist() == [[1, 8, 9, 0, 0], [1, 8, 9, 9, 2]]
    assert response_BL.tolist() == [[False, False, True, False, False], [False, False, False, True, True]]
