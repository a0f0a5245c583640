"""The declarations: arms and their constants, judged seeds, claims that the grid can answer."""

from dataclasses import replace

import pytest

from papers.cegppo.experiment import EXPERIMENT, RULES, map_cells, tabular_arms
from shared.experiment.claims import fixed_before, validate
from shared.experiment.results import Results
from shared.rl.losses import PPOClip, policy_losses
from shared.rl.regime_map import run_cell
from shared.rl.tabular import train_tabular


def test_claims_fit_their_studies():
    validate(EXPERIMENT)
    assert len({claim.id for claim in EXPERIMENT.claims}) == len(EXPERIMENT.claims)
    assert all(claim.n >= 5 for claim in EXPERIMENT.claims)


def test_every_arm_uses_the_papers_constants():
    assert RULES["grpo"][0] == PPOClip(0.2, 0.2, 10.0)
    assert RULES["dapo"][0] == PPOClip(0.2, 0.28, 10.0)
    for name, (loss, eps_high) in RULES.items():
        assert getattr(loss, "clip_ratio_c", 10.0) == 10.0
        range_ = (0.2, 0.28) if name in ("dapo", "gppo") else (0.2, 0.2)
        assert eps_high == range_[1]
        if name != "no_clip":
            assert (loss.eps_low, loss.eps_high) == range_
        if name.startswith("ce_"):
            assert (loss.beta1, loss.beta2) == tuple(float(x) for x in name.split("_")[1:])


@pytest.mark.parametrize("study", ["tabular", "full", "uniform", "reuse", "plain"])
def test_arms_of_a_study_differ_in_the_rule_alone(study):
    arms = next(one for one in EXPERIMENT.studies if one.name == study).arms
    for arm in arms.values():
        for name in arm.__dataclass_fields__:
            if name not in ("loss", "eps_high", "terms", "entropy_coef"):
                assert getattr(arm, name) == getattr(arms["grpo"], name)


def test_committed_runs_began_after_their_claims_were_fixed():
    results = Results.committed("cegppo", "proxy")
    for claim in EXPERIMENT.claims:
        for arm in claim.contrast:
            if claim.study in results.studies() and arm in results.arms(claim.study):
                for provenance in results.provenance(claim.study, arm).values():
                    assert fixed_before(claim, provenance), (claim.id, arm)


def test_judged_seeds_stay_below_the_free_ones():
    for study in EXPERIMENT.studies:
        for grid in (*study.scales.values(), *([study.headline] if study.headline else [])):
            assert max(grid.seeds) < 100


def test_the_papers_losses_are_registered():
    assert {"ce_gppo", "gppo", "ppo_clip", "cispo", "no_clip"} <= set(policy_losses())


class Run:
    """The least RunContext."""

    def __init__(self, config, seed):
        self.config, self.seed, self.logged = config, seed, []

    def rewind(self, step):
        self.logged = []

    def log(self, step, **metrics):
        self.logged.append({"step": step, **metrics})

    def rows(self):
        return self.logged

    def progress(self, done, total):
        pass

    def stop_requested(self):
        return False


def test_tabular_arms_order_and_summaries():
    ends = {}
    for name in ("ce_0_1", "ce_1_0", "bonus_0.003"):
        config = replace(tabular_arms()[name], rollouts=20)
        summary = train_tabular(Run(config, 100))
        ends[name] = summary["entropy_end"]
        assert summary["entropy_change"] == pytest.approx(summary["entropy_end"] - summary["entropy_start"])
    assert ends["ce_0_1"] > ends["ce_1_0"]


def test_a_map_cell_runs_all_rules_from_one_start():
    cell = map_cells()["zipf_0"]
    run = Run(replace(cell, world=replace(cell.world, rollouts=6, groups=8)), 100)
    summary = run_cell(run)
    assert {row["entropy_start"] for row in run.logged} == {run.logged[0]["entropy_start"]}
    want = summary["entropy_end_ce_1_1"] - summary["entropy_end_ce_1_0"]
    assert summary["beta2_at_beta1_1"] == pytest.approx(want)
