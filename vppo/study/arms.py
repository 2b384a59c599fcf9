"""The arms of the study: what each trains on, as options of `VPPOConfig`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vppo.errors import InputError

BASE = "dapo"  # what all others are set against


@dataclass(frozen=True)
class Arm:
    """One way to choose the tokens that carry gradient.

    Attributes:
        name: As `--arms` has it.
        label: As tables and figures show it.
        options: Fields of `VPPOConfig`.
    """

    name: str
    label: str
    options: dict[str, Any] = field(default_factory=dict)


ARMS = {
    arm.name: arm
    for arm in (
        Arm(BASE, "DAPO: all tokens", {"algorithm": "dapo"}),
        Arm("tgf", "TGF: top 40 % by exact KL", {"algorithm": "tgf"}),
        Arm("vppo", "VPPO: TGF and TAS", {"algorithm": "vppo"}),
        Arm("k3", "VPPO by k3", {"algorithm": "vppo", "divergence": "k3"}),
        Arm("random", "random 40 %", {"algorithm": "random"}),
        Arm("entropy", "top 40 % by entropy", {"algorithm": "entropy"}),
        Arm("oracle", "oracle: the read tokens", {"algorithm": "oracle"}),
        Arm("gate", "KL above 1 nat, 1 draw", {"algorithm": "tgf", "keep_ratio": 1.0, "keep_threshold": 1.0}),
        Arm(
            "gate4",
            "KL above 1 nat, 4 draws",
            {"algorithm": "tgf", "keep_ratio": 1.0, "keep_threshold": 1.0, "draws": 4},
        ),
        Arm("tas", "TAS alone", {"algorithm": "tas"}),
    )
}


def arms_of(names: Sequence[str]) -> list[Arm]:
    """The arms of these names.

    Raises:
        InputError: There is no such arm, or one is named twice, or none at all.
    """
    unknown = [name for name in names if name not in ARMS]
    if unknown or not names:
        raise InputError(f"--arms: got {', '.join(unknown) or 'none'}, takes some of {','.join(ARMS)}")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"--arms: got {', '.join(twice)} twice, takes each arm once")
    return [ARMS[name] for name in names]
