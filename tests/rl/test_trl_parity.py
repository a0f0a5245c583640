"""The four losses that TRL also has, on the same tensors: GRPOTrainer._compute_loss itself is called."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from shared.rl.aggregate import Denominators
from shared.rl.losses import CISPOCap, PPOClip
from shared.rl.pipeline import Terms, policy_loss

MAX_LENGTH = 12


def trl_loss(inputs, loss_type: str, eps_low: float, eps_high: float) -> torch.Tensor:
    from trl.trainer.grpo_trainer import GRPOTrainer

    class Accelerator:
        num_processes = 1

        def gather(self, x):
            return x

        def reduce(self, x, reduction):
            return x

    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (inputs.logp_BT, torch.zeros_like(inputs.logp_BT), None),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=0.0,
        loss_type=loss_type,
        epsilon_low=eps_low,
        epsilon_high=eps_high,
        args=SimpleNamespace(delta=None),
        use_vllm=False,
        model=SimpleNamespace(training=False),
        max_completion_length=MAX_LENGTH,
        accelerator=Accelerator(),
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        _metrics={"eval": defaultdict(list)},
    )
    ids = torch.zeros_like(inputs.logp_BT, dtype=torch.long)
    batch = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": inputs.mask_BT,
        "advantages": inputs.advantages_BT[:, 0],
        "old_per_token_logps": inputs.logp_old_BT,
        "num_items_in_batch": inputs.mask_BT.sum(),
    }
    return GRPOTrainer._compute_loss(trainer, None, batch)


CASES = {
    "grpo": (PPOClip(0.2, 0.28, None), "seq-mean-token-mean", 0.28),
    "dr_grpo": (PPOClip(0.2, 0.28, None), "seq-mean-token-sum-norm", 0.28),
    "dapo": (PPOClip(0.2, 0.28, None), "token-mean", 0.28),
    "cispo": (CISPOCap(1.3), "token-mean", 1.3),
}


@pytest.mark.parametrize("loss_type", CASES)
@pytest.mark.parametrize("seed", range(5))
def test_value_and_gradient_equal_trls(loss_type, seed, random_inputs):
    pytest.importorskip("trl", reason="needs the dev extra")
    rule, mode, eps_high = CASES[loss_type]
    inputs = random_inputs(seed, scale=0.8)
    peer = trl_loss(inputs, loss_type, 0.2, eps_high)
    denominators = Denominators.of(inputs.mask_BT, norm=len(inputs.mask_BT) * MAX_LENGTH)
    ours = policy_loss(inputs, rule, Terms(aggregation=mode), denominators).loss
    assert math.isclose(ours.item(), peer.item(), abs_tol=1e-6)
    ours_grad, peer_grad = (torch.autograd.grad(x, inputs.logp_BT)[0] for x in (ours, peer))
    torch.testing.assert_close(ours_grad, peer_grad, atol=1e-6, rtol=1e-6)
    assert (ours_grad != 0).any()
