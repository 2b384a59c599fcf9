"""10,000 generated pairs of answers whose truth is known by construction: 99.5 % are graded right, and all in time."""

from __future__ import annotations

import os
from collections import Counter

import pytest
from support.answer_pairs import KINDS, pairs

from vppo.evaluation.graders import Item, verdicts

pytestmark = pytest.mark.fuzz
PAIRS = int(os.environ.get("VPPO_FUZZ_PAIRS", "10000"))


def test_pairs_of_known_truth() -> None:
    found = list(pairs(PAIRS, seed=0))
    items = [Item("", pair.reference, rf"\boxed{{{pair.predicted}}}") for pair in found]
    judged = verdicts("math-verify", items)
    wrong = [pair for pair, verdict in zip(found, judged, strict=True) if bool(verdict) != pair.equal]
    assert {pair.kind for pair in found} == set(KINDS)
    assert len(wrong) <= 0.005 * len(found), (Counter(pair.kind for pair in wrong), wrong[:20])
