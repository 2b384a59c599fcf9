"""verl's worker, whose actor and reference are engines of this package."""

from __future__ import annotations

import os
from typing import Any

from verl.workers.engine import EngineRegistry
from verl.workers.engine_workers import ActorRolloutRefWorker

from vppo.verl.engine import VENDOR, VPPOEngine


class VPPOWorker(ActorRolloutRefWorker):
    """Takes the same arguments.

    Raises:
        RuntimeError: verl's registry would build another engine.
    """

    def __init__(self, config: Any, role: str, *args: Any, **kwargs: Any) -> None:
        os.environ["VERL_ENGINE_VENDOR"] = VENDOR  # verl's own way to pick one of several engines
        engine = EngineRegistry.get_engine_cls("language_model", config.actor.strategy)
        if engine is not VPPOEngine:
            raise RuntimeError(f"verl picks the engine {engine.__name__}, not {VPPOEngine.__name__}")
        super().__init__(config, role, *args, **kwargs)
