"""VPPO on verl: many nodes, FSDP2, vLLM or SGLang, sequence parallelism, with no line of verl changed.

verl loads this package by its entry point `verl.plugins`; `trainer.v1.trainer_mode=vppo` then trains with VPPO. See
docs/verl.md for the keys under `trainer.v1.vppo`.
"""

from __future__ import annotations

import logging
from importlib.metadata import version

from vppo.extras import named_extras

logger = logging.getLogger(__name__)

try:
    with named_extras():
        import verl

        from vppo.verl.seams import check_seams

        check_seams()
        from vppo.verl import engine, trainer  # noqa: F401  (they register themselves)
except Exception as error:  # verl swallows what goes wrong in a plug-in, and then knows no trainer_mode "vppo"
    logger.error(f"vppo-kernels is not loaded into verl: {type(error).__name__}: {error}")
    raise

logger.warning(
    f"vppo-kernels {version('vppo-kernels')} is loaded into verl {verl.__version__}: trainer.v1.trainer_mode=vppo"
)
