"""Options check themselves by what their fields say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from demerge.errors import UsageError
from demerge.options import Options, again, choices_of, option, spec_of


@dataclass(frozen=True, kw_only=True, repr=False)
class Sizes(Options):
    share: float = option(0.5, "Share.", gt=0, le=1)
    kind: Literal["a", "b"] = option("a", "Kind.")
    place: Path | None = option(None, "Place.")


@dataclass(frozen=True, kw_only=True, repr=False)
class OtherSizes(Options):
    share: float = again(Sizes, "share", default=1.0)


@pytest.mark.parametrize("share", [0.0, 1.5, float("nan"), "x", True])
def test_a_number_outside_its_interval_is_refused(share: float) -> None:
    with pytest.raises(UsageError, match=r"share is .*\n.*it must be above 0 and at most 1"):
        Sizes(share=share)


def test_a_word_that_is_not_a_choice_is_refused() -> None:
    with pytest.raises(UsageError, match=r"kind is 'c'\n.*one of a, b"):
        Sizes(kind="c")  # type: ignore[arg-type]


def test_values_are_short_and_paths_may_be_text() -> None:
    assert repr(Sizes(kind="b")) == "Sizes(kind='b')"
    assert Sizes(place="x").place == Path("x")  # type: ignore[arg-type]
    assert Sizes().document() == {"share": 0.5, "kind": "a", "place": None}


def test_an_option_can_be_taken_again_with_another_default() -> None:
    field = OtherSizes.__dataclass_fields__["share"]
    assert (OtherSizes().share, spec_of(field).rule) == (1.0, "above 0 and at most 1")
    assert choices_of(Literal["a", "b"] | None) == ("a", "b")
