"""A run context in memory, the same on every rank but for the rows, which rank 0 keeps in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shared.training.agree import any_rank, from_rank_0, rank


class Recorder:
    """`RunContext` whose stop is requested at a chosen step, on a chosen rank."""

    arm = study = scale = "test"

    def __init__(self, folder: Path | str, stop_at: int | None = None, stop_rank: int = 0) -> None:
        self.dir = Path(folder)
        self.config, self.seed = None, 0
        self.stop_at, self.stop_rank = stop_at, stop_rank
        self.clocks: list[dict[str, float]] = []
        self.step = -1

    @property
    def checkpoints(self) -> Path:
        return self.dir / "checkpoints"

    def rows(self) -> list[dict[str, Any]]:
        file = self.dir / "rows.jsonl"
        text = from_rank_0(file.read_text() if rank() == 0 and file.exists() else "")
        return [json.loads(line) for line in text.splitlines()]

    def rewind(self, step: int) -> None:
        self._write([row for row in self.rows() if row["step"] <= step])

    def log(self, step: int, **metrics: float) -> None:
        self.step = step
        self._write([*self.rows(), {"step": step, **metrics}])

    def _write(self, rows: list[dict[str, Any]]) -> None:
        if rank() == 0:
            self.dir.mkdir(parents=True, exist_ok=True)
            (self.dir / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def time(self, step: int, **clocks: float) -> None:
        self.clocks.append({"step": step, **clocks})

    def progress(self, done: int, total: int) -> None:
        assert 0 < done <= total

    def stop_requested(self) -> bool:
        return any_rank(self.step + 1 == self.stop_at and rank() == self.stop_rank)

    def artifact(self, name: str) -> Path:
        raise NotImplementedError
