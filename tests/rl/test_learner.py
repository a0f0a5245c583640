"""The learner and the trainer on a tiny GPTModel: layout, resume, identical seeds, non-finite values."""

import copy
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from shared.data.tasks.base import Verdict
from shared.data.tasks.countdown import PlainCountdown, StyledCountdown
from shared.engines.contracts import Rollouts
from shared.engines.native import NativeEngine
from shared.experiment.contracts import Interrupted, NonFinite
from shared.experiment.records import RunDirectory
from shared.megatron.model import ModelConfig, build_model, forward_logits, untie
from shared.rl.config import OptimizerConfig, RLConfig
from shared.rl.learner import Learner, response_logits
from shared.rl.losses import NoClip, PPOClip
from shared.rl.paired import MechanismConfig, PairedConfig, mechanism_run, paired_test
from shared.rl.pipeline import Terms
from shared.rl.replay import stored_rollout
from shared.rl.rollout import Collector, pad_batch
from shared.rl.trainer import train_rl
from shared.training.checkpoint import save_weights


@dataclass(frozen=True)
class FirstTokenEven(StyledCountdown):
    """An easy verifier, so that a random policy earns mixed rewards: the first token is even."""

    max_response_len = 4

    def verify(self, problem, response_ids):
        return Verdict(response_ids[0] % 2 == 0, "ok" if response_ids[0] % 2 == 0 else "target")


def config(**fields) -> RLConfig:
    task = fields.pop("task", StyledCountdown())
    model = ModelConfig(1, 32, 2, 2, 16, 48, task.vocab_size, 40, qk_layernorm=True, init_std=0.2)
    base = RLConfig(
        loss=PPOClip(0.2, 0.2, 10.0),
        task=task,
        model=model,
        policy="warm",
        untie_head=True,
        optimizer=OptimizerConfig(body_lr=1e-3, head_lr=1e-2, warmup_rollouts=0),
        prompts=6,
        gen_prompts=6,
        samples=4,
        minibatches=2,
        rollouts=4,
        pool=32,
        dynamic_sampling="off",
        eval_problems=4,
        eval_samples=2,
        eval_every=2,
        checkpoint_every=2,
    )
    return replace(base, **fields)


class Run(RunDirectory):
    """A record whose warm start is a seeded random model, and which can be asked to stop after some rows."""

    stop_after = 10**9

    def artifact(self, name: str):
        path = self.dir / name
        if not path.exists():
            path.mkdir()
            save_weights(path / "weights.safetensors", build_model(self.config.model, 3).state_dict())
        return path

    def stop_requested(self) -> bool:
        return len(self.rows()) >= self.stop_after


def open_run(path, conf, seed=0) -> Run:
    return Run.open(path, conf, seed)


@pytest.mark.parametrize("task", [StyledCountdown(), PlainCountdown(numbers=(3, 4))], ids=lambda t: t.name)
def test_logits_line_up_with_the_response_tokens(task):
    conf = config(task=task)
    batch = stored_rollout(conf, 0)
    model = build_model(conf.model, 0)
    logits_BTV = response_logits(model, batch, 1.0)
    assert logits_BTV.shape[:2] == batch.mask_BT.shape
    for row in range(0, len(batch), 5):
        first, n = int(batch.prompt_len_B[row]), int(batch.mask_BT[row].sum())
        alone_TV = forward_logits(model, batch.tokens_BL[row : row + 1, : first + n])[0]
        torch.testing.assert_close(logits_BTV[row, :n], alone_TV[first - 1 : first + n - 1], atol=1e-5, rtol=1e-5)
        assert batch.tokens_BL[row, first : first + n].tolist() == batch.response_BT[row, :n].tolist()


def test_a_sub_batch_of_one_prompt_length_may_be_longer_than_the_logits():
    lengths_N = torch.tensor([2, 5])
    rollouts = Rollouts(
        torch.ones(2, 5, dtype=torch.long), torch.zeros(2, 5), lengths_N, torch.tensor([6, 3]), ("stop",) * 2
    )
    batch = pad_batch([[1] * 6, [1] * 3], rollouts, torch.ones(2), torch.ones(2), 0)
    model = build_model(config().model, 0)
    assert response_logits(model, batch.rows(torch.tensor([0])), 1.0).shape[:2] == (1, 5)


def test_score_equals_the_engines_own_log_probabilities():
    conf = config(temperature=0.7)
    model = build_model(conf.model, 0)
    batch, _ = Collector(conf, NativeEngine(model, conf.task.eos_id, conf.task.pad_id), seed=1).collect(0)
    assert batch is not None
    logp_BT, entropy_BT = Learner(replace(conf, optimizer=OptimizerConfig(1e-3)), model).score(batch)
    torch.testing.assert_close(logp_BT, batch.logp_rollout_BT, atol=1e-5, rtol=1e-5)
    assert (entropy_BT[batch.mask_BT == 0] == 0).all()


def learner_of(conf: RLConfig) -> Learner:
    return Learner(conf, untie(build_model(conf.model, 0)))


def test_one_mini_batch_first_update_is_reinforce():
    """With r = 1 every ratio rule takes the same step, and its clip metrics are zero."""
    conf = config(minibatches=1)
    batch = stored_rollout(conf, 0)
    weights = []
    for loss in (PPOClip(0.2, 0.2, 10.0), NoClip()):
        learner = learner_of(replace(conf, loss=loss))
        metrics = learner.update(batch, seed=0, rollout=0)
        assert metrics["clip_low"] == metrics["clip_high"] == 0
        assert metrics["ratio_max"] == pytest.approx(1.0, abs=1e-5)
        weights.append(learner.model.output_layer.weight.detach().clone())
    torch.testing.assert_close(weights[0], weights[1])


def test_head_and_body_learn_at_their_own_rates_and_warm_up_linearly():
    conf = config(optimizer=OptimizerConfig(body_lr=1e-5, head_lr=1e-3, warmup_rollouts=2), minibatches=2)
    learner = learner_of(conf)
    batch = stored_rollout(conf, 0)
    seen = []
    learner.optimizer.adamw.register_step_pre_hook(lambda o, *_: seen.append([g["lr"] for g in o.param_groups]))
    for rollout in range(3):
        learner.update(batch, seed=0, rollout=rollout)
    want = [[1e-5 * min(1, k / 4), 1e-3 * min(1, k / 4)] for k in range(1, 7)]
    assert np.allclose(seen, want)


def test_head_rate_without_an_own_head_is_refused():
    with pytest.raises(ValueError, match="untie_head"):
        Learner(config(), build_model(config().model, 0))


def test_positive_term_raises_the_likelihood_of_correct_responses():
    conf = config(minibatches=1, terms=Terms(positive_coef=5.0))
    batch = stored_rollout(conf, 0)
    batch = replace(batch, advantages_B=torch.zeros_like(batch.advantages_B))
    learner = learner_of(conf)
    before = learner.score(batch)[0]
    learner.update(batch, seed=0, rollout=0)
    gain_B = (learner.score(batch)[0] - before).sum(-1)
    assert gain_B[batch.reward_B == 1].mean() > 0


def test_dynamic_sampling_drops_equal_groups_and_refill_draws_again():
    conf = config(dynamic_sampling="drop", max_gen_batches=3)
    calls = []

    class Scripted:
        """An engine whose first batch is all wrong and whose later ones solve every second sample."""

        def generate(self, prompts, sampling, n, seed):
            calls.append(seed)
            rng = np.random.default_rng(0)
            rows = []
            for prompt in prompts:
                problem = next(p for p in conf.task.problems("rl", conf.pool, 0) if conf.task.prompt(p) == list(prompt))
                good = conf.task.derivation(problem, rng)
                rows += [good if len(calls) > 1 and k % 2 else good[:1] for k in range(n)]
            lengths = torch.tensor([len(row) for row in rows])
            tokens = torch.tensor([row + [0] * (int(lengths.max()) - len(row)) for row in rows])
            reasons = tuple("stop" if len(row) > 1 else "length" for row in rows)
            return Rollouts(tokens, -torch.ones(tokens.shape), lengths, torch.full((len(rows),), 7), reasons)

    batch, metrics = Collector(conf, Scripted(), seed=0).collect(0)
    assert batch is not None
    assert len(calls) == 2
    assert len(set(calls)) == 2
    assert metrics["groups_kept"] == 6
    assert metrics["reward"] == pytest.approx(0.25)
    assert (metrics["reason_ok"], metrics["truncated"]) == pytest.approx((0.25, 0.75))
    assert set(batch.advantages_B.tolist()) == {batch.advantages_B.max().item(), batch.advantages_B.min().item()}
    calls.clear()
    short, metrics = Collector(replace(conf, max_gen_batches=1), Scripted(), seed=0).collect(0)
    assert short is None
    assert metrics["groups_kept"] == 0


def test_same_seed_twice_and_interrupted_runs_log_the_same_bytes(tmp_path):
    conf = config(task=FirstTokenEven())
    texts = []
    for name in ("a", "b"):
        with open_run(tmp_path / name, conf) as run:
            train_rl(run)
            assert run.rows()[-1]["grad_norm"] > 0
        texts.append((tmp_path / name / "metrics.jsonl").read_bytes())
    for stop in (1, 3):
        path = tmp_path / f"stopped{stop}"
        with open_run(path, conf) as run:
            run.stop_after = stop
            with pytest.raises(Interrupted):
                train_rl(run)
        with open_run(path, conf) as run:
            train_rl(run)
        texts.append((path / "metrics.jsonl").read_bytes())
    assert len(set(texts)) == 1


def test_a_nan_gradient_stops_before_the_step_and_names_the_checkpoint(tmp_path):
    conf = config()
    learner = learner_of(conf)
    batch = stored_rollout(conf, 0)
    before = copy.deepcopy(learner.model.state_dict())
    broken = replace(batch, advantages_B=torch.full_like(batch.advantages_B, float("nan")))
    with pytest.raises(NonFinite, match="rollout 7, epoch 0, mini-batch 0"):
        learner.update(broken, seed=0, rollout=7)
    for name, tensor in learner.model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(tensor, before[name])


def test_a_run_that_diverges_names_the_last_good_checkpoint(tmp_path):
    wild = config(task=FirstTokenEven(), optimizer=OptimizerConfig(1e3, 1e30, warmup_rollouts=0))
    with open_run(tmp_path / "run", wild) as run, pytest.raises(NonFinite, match="last good checkpoint"):
        train_rl(run)


RULES = {"a": {"loss": PPOClip(0.2, 0.2, 10.0)}, "b": {"loss": PPOClip(0.2, 0.2, 10.0)}, "free": {"loss": NoClip()}}


class PairedRun(Run):
    """As `Run`, for configs that hold an RLConfig as `base`; stops once `polls` questions were asked."""

    polls = 10**9

    def artifact(self, name: str):
        path = self.dir / name
        path.mkdir(exist_ok=True)
        save_weights(path / "weights.safetensors", build_model(self.config.base.model, 3).state_dict())
        return path

    def stop_requested(self) -> bool:
        self.polls -= 1
        return self.polls == 0


def test_paired_test_gives_equal_rules_equal_changes(tmp_path):
    conf = PairedConfig(config(task=FirstTokenEven()), 1, 2, RULES, {"same": {"a": 1.0, "b": -1.0}}, probe_prompts=4)
    with PairedRun.open(tmp_path / "run", conf, 0) as run:
        summary = paired_test(run)
    assert summary["diff_same"] == 0
    assert summary["change_a"] != 0
    assert summary["change_a"] != summary["change_free"]


PAIRED = PairedConfig(config(task=FirstTokenEven()), 3, 3, RULES, {"same": {"a": 1.0, "b": -1.0}}, probe_prompts=4)
MECHANISM = MechanismConfig(config(task=FirstTokenEven(), epochs=4, optimizer=OptimizerConfig(3e-3, 5e-2)), 2, 3)


@pytest.mark.parametrize(
    ("conf", "function"), [(PAIRED, paired_test), (MECHANISM, mechanism_run)], ids=["pair", "mech"]
)
def test_stopped_in_preparation_and_at_a_probe_ends_with_the_same_bytes(tmp_path, conf, function):
    with PairedRun.open(tmp_path / "whole", conf, 0) as run:
        want = function(run)
    with PairedRun.open(tmp_path / "run", conf, 0) as run:
        run.polls = 2
        with pytest.raises(Interrupted, match="preparing"):
            function(run)
        assert list(run.checkpoints.iterdir())
    with PairedRun.open(tmp_path / "run", conf, 0) as run:
        run.polls = conf.rollouts_before - 2 + 1
        with pytest.raises(Interrupted, match="probe"):
            function(run)
    with PairedRun.open(tmp_path / "run", conf, 0) as run:
        assert function(run) == want
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_mechanism_totals_are_sums_over_observed_rollouts(tmp_path):
    with PairedRun.open(tmp_path / "run", MECHANISM, 0) as run:
        summary, rows = mechanism_run(run), run.rows()
    assert summary["rollouts"] == len(rows) == 3
    for branch in ("low", "high"):
        tokens = sum(row[f"tokens_{branch}"] for row in rows)
        assert summary[f"tokens_{branch}"] == tokens
        assert summary[f"clip_{branch}"] == pytest.approx(tokens / sum(row["tokens"] for row in rows))
        total = sum(row[f"first_order_{branch}"] for row in rows)
        assert summary[f"first_order_{branch}_per_rollout"] == pytest.approx(total / 3)
        assert summary[f"worst_error_{branch}"] < 1e-3
    assert summary["tokens_low"] + summary["tokens_high"] > 0


def test_metrics_of_an_update_agree_with_a_recount():
    conf = config(minibatches=1, epochs=2)
    batch, learner = stored_rollout(conf, 0), learner_of(conf)
    before_BT = learner.score(batch)[0]
    learner.config = replace(conf, epochs=1)
    learner.update(batch, seed=0, rollout=0)
    after_BT = learner.score(batch)[0]
    fresh = learner_of(conf)
    metrics = fresh.update(batch, seed=0, rollout=0)
    valid_BT = batch.mask_BT.bool()
    log_ratio = (after_BT - before_BT)[valid_BT]
    assert metrics["ppo_kl"] == pytest.approx(-log_ratio.mean().item() / 2, abs=1e-5)
    adv = batch.advantages_B[:, None].expand_as(before_BT)[valid_BT]
    clipped = ((log_ratio.exp() < 0.8) & (adv < 0)).double().mean().item()
    assert metrics["clip_low"] == pytest.approx(clipped / 2, abs=1e-9)
    assert metrics["ratio_max"] == pytest.approx(log_ratio.exp().max().item(), rel=1e-4)
