"""Reference answers as one text each."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any

from vppo.data.bad_rows import Where

TAGGED = re.compile(r"<answer>((?:(?!<answer>).)*)</answer>\s*\Z", re.DOTALL)


def reference_answer(value: Any, column: str, where: Where) -> str | None:
    r"""A reference answer as text, or None where there is none.

    A number is written as people write it (`0.00005`), a list of one answer is that answer, and of a worked solution
    that ends with `<answer>...</answer>` only what is inside counts. A `\boxed{...}` is left to the reward.

    Raises:
        BadRowError: It is not one text or number.
    """
    if isinstance(value, list | tuple):
        if len(value) > 1:
            raise where.bad(column, f"takes one answer, got a list of {len(value)}: {value!r:.80}")
        value = value[0] if value else None
    if value is None:
        return None
    if isinstance(value, float):
        if not math.isfinite(value):
            raise where.bad(column, f"takes text or a number, got {value}")
        value = plain_number(value)
    if not isinstance(value, str | int | Decimal):
        raise where.bad(column, f"takes text or a number, got {type(value).__name__}: {value!r:.80}")
    text = str(value).strip()
    tagged = TAGGED.search(text)
    return (tagged[1].strip() if tagged else text) or None


def plain_number(value: float) -> str:
    """The shortest decimal that reads back as the same number, without an exponent."""
    return format(Decimal(repr(value)), "f")
