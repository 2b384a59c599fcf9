"""What the paper reports of its own models, to be put beside what was measured here."""

from __future__ import annotations

SOURCE = (
    "avg@8 accuracy in percent as published in “Spotlight on Token Perception for Multimodal Reinforcement Learning” "
    "(arXiv 2510.09285); not measured here"
)
BENCHMARKS = ("mathverse", "dynamath", "mmk12", "geo3k", "mathvision", "wemath", "logicvista", "mmmu_pro")
_ROWS = {
    "Qwen2.5-VL-7B": (39.0, 55.7, 42.5, 37.1, 18.4, 46.4, 42.4, 25.1, 38.3),
    "+ GRPO": (66.5, 65.8, 72.3, 40.2, 30.7, 68.1, 45.6, 35.2, 53.1),
    "+ DAPO": (68.3, 66.6, 82.1, 41.5, 30.5, 68.0, 46.8, 35.9, 55.0),
    "+ TAS only": (70.4, 67.5, 83.3, 43.5, 31.3, 69.3, 47.4, 37.3, 56.3),
    "+ TGF only": (71.2, 68.6, 80.9, 45.3, 34.7, 70.3, 48.2, 37.3, 57.1),
    "+ VPPO": (71.6, 68.1, 82.8, 46.5, 33.3, 71.5, 47.9, 37.9, 57.5),
}
AVERAGE = "average"
PUBLISHED: dict[str, dict[str, float]] = {
    model: dict(zip((*BENCHMARKS, AVERAGE), values, strict=True)) for model, values in _ROWS.items()
}
