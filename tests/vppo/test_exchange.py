"""Attributes that are exchanged come back, whoever had them."""

from __future__ import annotations

import types

import pytest

from vppo.exchange import exchanged


class Base:
    kind = "base"

    def name(self) -> str:
        return self.kind


class Own(Base):
    kind = "own"


@pytest.mark.parametrize("owner", [Base, Own, Base(), types.SimpleNamespace(kind="plain")])
def test_what_was_there_comes_back_after_an_error(owner: object) -> None:
    before = dict(vars(owner))
    with pytest.raises(ZeroDivisionError), exchanged(owner, kind="other"):
        assert owner.kind == "other"  # type: ignore[attr-defined]
        raise ZeroDivisionError
    assert dict(vars(owner)) == before


def test_a_static_method_stays_one() -> None:
    class Static:
        @staticmethod
        def double(x: int) -> int:
            return 2 * x

    with exchanged(Static, double=lambda self, x: 3 * x):
        assert Static().double(2) == 6
    assert Static().double(2) == 4


def test_a_name_that_is_not_there_is_refused_before_anything_is_exchanged() -> None:
    owner = types.SimpleNamespace(kind="plain")
    with pytest.raises(AttributeError, match="forward"), exchanged(owner, kind="other", forward=None):
        raise AssertionError("not reached")
    assert owner.kind == "plain"
