import json
from dataclasses import asdict

from papers.cegppo.experiment import CEGPPO
from papers.cegppo.full import full


def test_the_papers_betas_by_size_and_eight_updates_per_rollout():
    small, large = full("1.5b"), full("7b")
    assert (small.loss_fields["beta1"], large.loss_fields["beta1"]) == (0.5, 0.75)
    assert small.train_prompts // small.minibatch_prompts == 8
    assert (small.validation.max_response_tokens, large.validation.max_response_tokens) == (16_384, 32_768)
    json.dumps(asdict(small))


def test_the_settings_are_fields_of_the_registered_loss():
    assert CEGPPO(**full("7b").loss_fields) == CEGPPO(beta1=0.75)
