"""The table of docs/reliability.md, made from the numbers that the tests use.

python -m tests.reliability.page
"""

from __future__ import annotations

from pathlib import Path

from shared.experiment.markdown import fill, table
from tests.reliability import test_kills, test_power_cut, test_rank_kills, test_small_disk

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"


def campaign_table() -> str:
    """What is struck how often, and what holds afterwards."""
    runs = "SFT, RL, pretraining"
    sizes = len(test_small_disk.KILOBYTES), len(test_small_disk.BYTES)
    rows = [
        (
            "SIGKILL before, after or in the middle of a call that changes files, before a row, or at a random time",
            runs,
            f"{test_kills.KILLS} or more each",
            "rows, summary, weights and optimizer state equal to the bit; the newest checkpoint is used",
            "test_kills",
        ),
        (
            "SIGKILL of one of two ranks, as above",
            ", ".join(f"{kind} under {layout}" for kind, (_, _, layout) in test_rank_kills.KINDS.items()),
            f"{test_rank_kills.KILLS} each",
            "rows, summary, weights and optimizer state equal to the bit",
            "test_rank_kills",
        ),
        (
            "SIGKILL of one of two ranks that torchrun's agent started",
            f"pretraining under {test_rank_kills.SHARDED}",
            "1",
            "the group ends within 60 s and names rank and signal; then the same",
            "test_rank_kills",
        ),
        (
            "power cut: ends cut off, blocks of zeros or nothing left in rows, clocks, costs and checkpoints",
            ", ".join(test_power_cut.KINDS),
            f"{test_power_cut.ROUNDS} each",
            "rows and last state equal to the bit",
            "test_power_cut",
        ),
        (
            "disk full from a call on, for every call of a save",
            "checkpoint, weights, JSON, record, artifact, promotion",
            "every call",
            "one sentence that names the file; what was there is intact; the next attempt succeeds",
            "test_disk_full",
        ),
        (
            "disk full in a run: from a random call on; a tmpfs; a limit on file size",
            f"{runs}, each",
            f"{test_small_disk.ROUNDS} + {sizes[0]} + {sizes[1]}",
            "one sentence; once there is space, everything equal to the bit",
            "test_small_disk",
        ),
    ]
    return table(("accident", "struck", "times", "afterwards", "tests/reliability"), rows)


def page() -> str:
    """The page with its table as it should be."""
    return fill(PAGE.read_text(encoding="utf-8"), PAGE.name, lambda kind, name: campaign_table())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
