"""Fields by name, values by type, typos by their closest neighbour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.experiment.overrides import BadValue, UnknownName, field_names, replace_fields, set_fields


@dataclass(frozen=True)
class Inner:
    beta: float = 1
    limit: int | None = None


@dataclass(frozen=True)
class Config:
    lr: float = 0.1
    steps: int = 3
    on: bool = False
    name: str = "a"
    kind: Literal["x", "y"] = "x"
    betas: tuple[float, ...] = (0.9,)
    inner: Inner = Inner()
    other: object = None


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("lr", "2", 2.0),
        ("steps", "7", 7),
        ("on", "true", True),
        ("name", "b=c", "b=c"),
        ("kind", "y", "y"),
        ("betas", "0.5, 1e-3", (0.5, 0.001)),
    ],
)
def test_text_becomes_a_value_of_the_field(name: str, text: str, value: object) -> None:
    changed = getattr(set_fields(Config(), {name: text}), name)
    assert changed == value
    assert type(changed) is type(value)


def test_dots_lead_into_nested_configs() -> None:
    changed = set_fields(Config(), {"inner.beta": "0.5", "inner.limit": "4"})
    assert changed.inner == Inner(0.5, 4)
    assert set_fields(changed, {"inner.limit": "none"}).inner == Inner(0.5, None)
    assert replace_fields(Config(), {"inner.beta": 0.25}).inner.beta == 0.25
    assert "inner.limit" in field_names(Config())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stepz", "did you mean 'steps'"),
        ("inner.betta", r"did you mean 'inner\.beta'"),
        ("lr.x", "Unknown field 'lr.x'"),
    ],
)
def test_unknown_fields_are_answered_with_the_closest(name: str, message: str) -> None:
    with pytest.raises(UnknownName, match=message):
        set_fields(Config(), {name: "1"})


@pytest.mark.parametrize(
    ("name", "text"),
    [("lr", "fast"), ("steps", "1.5"), ("on", "1"), ("kind", "z"), ("inner", "x"), ("inner.limit", "q")],
)
def test_values_of_another_type_are_refused(name: str, text: str) -> None:
    with pytest.raises(BadValue, match=f"Field '{name}' takes"):
        set_fields(Config(), {name: text})


@given(st.floats(allow_nan=False))
def test_floats_survive_exactly(value: float) -> None:
    assert set_fields(Config(), {"lr": repr(value)}).lr == value
