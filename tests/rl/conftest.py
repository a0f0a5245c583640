import pytest
import torch

from shared.rl.inputs import LossInputs

RATIOS = (0.01, 0.5, 0.8, 0.9, 1.0, 1.1, 1.2, 1.28, 1.5, 9.9, 12.0)


@pytest.fixture
def grid():
    """LossInputs of every (r, A) pair, float64, shape (1, N); exact ratios by construction."""
    pairs = [(r, a) for r in RATIOS for a in (-2.0, -1.0, 0.0, 1.0, 2.5)]
    r_N = torch.tensor([p[0] for p in pairs], dtype=torch.float64)
    adv_BT = torch.tensor([[p[1] for p in pairs]], dtype=torch.float64)
    logp_BT = (r_N.log() - 3.0)[None].requires_grad_()
    return pairs, LossInputs(logp_BT, torch.full_like(logp_BT, -3.0).detach(), adv_BT, torch.ones_like(adv_BT))


@pytest.fixture
def random_inputs():
    """A function: seeded random LossInputs (B, T) in float64 with ragged masks and a share of clipped tokens."""

    def make(seed: int, batch: int = 6, width: int = 9, scale: float = 0.4) -> LossInputs:
        g = torch.Generator().manual_seed(seed)
        logp_old_BT = -3 * torch.rand(batch, width, generator=g, dtype=torch.float64)
        logp_BT = (logp_old_BT + scale * torch.randn(batch, width, generator=g, dtype=torch.float64)).requires_grad_()
        adv_BT = torch.randn(batch, 1, generator=g, dtype=torch.float64).expand(batch, width).contiguous()
        lengths_B = torch.randint(1, width + 1, (batch,), generator=g)
        mask_BT = (torch.arange(width) < lengths_B[:, None]).double()
        return LossInputs(logp_BT, logp_old_BT, adv_BT, mask_BT)

    return make
