"""VPPO: reinforcement learning that rewards a vision-language model for looking."""

from typing import TYPE_CHECKING, Any

from vppo.extras import named_extras

if TYPE_CHECKING:
    from vppo.analysis.options import AnalysisOptions
    from vppo.analysis.run import Analysis, analyze
    from vppo.config import VPPOConfig
    from vppo.trainer import VPPOTrainer
    from vppo_kernels import vppo_loss

__all__ = ["Analysis", "AnalysisOptions", "VPPOConfig", "VPPOTrainer", "analyze", "vppo_loss"]


def __getattr__(name: str) -> Any:
    """Import on first use: torch, transformers and TRL take seconds, and `vppo --help` needs none of them."""
    with named_extras():
        if name in ("Analysis", "AnalysisOptions", "analyze"):
            import vppo.analysis.run

            return getattr(vppo.analysis.run, name)
        if name == "VPPOConfig":
            from vppo.config import VPPOConfig

            return VPPOConfig
        if name == "VPPOTrainer":
            from vppo.trainer import VPPOTrainer

            return VPPOTrainer
    if name == "vppo_loss":
        from vppo_kernels import vppo_loss

        return vppo_loss
    raise AttributeError(f"module 'vppo' has no attribute {name!r}")
