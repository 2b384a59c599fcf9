"""Which checkpoint a run can go on from, and how its weights come back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

STATE_FILE = "trainer_state.json"


def saved_step(checkpoint: str | Path) -> int | None:
    """The step at which a checkpoint was completely saved, or None where saving was cut short.

    transformers writes `trainer_state.json` after everything else: a folder without a whole one is what a crash left.

    Args:
        checkpoint: A folder as transformers' trainer saves it.

    Returns:
        The optimizer steps done, or None.
    """
    try:
        state = json.loads((Path(checkpoint) / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    step = state.get("global_step") if isinstance(state, dict) else None
    return step if isinstance(step, int) else None


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint of a run that was saved to its end.

    Args:
        output_dir: The run's folder, with `checkpoint-N` folders in it. It need not exist.

    Returns:
        The `checkpoint-N` of highest N whose state says that N steps were done, or None.
    """
    numbered = {
        int(suffix): path
        for path in Path(output_dir).glob("checkpoint-*")
        if (suffix := path.name.removeprefix("checkpoint-")).isdecimal()
    }
    return next((numbered[step] for step in sorted(numbered, reverse=True) if saved_step(numbered[step]) == step), None)


def restore_weights(model: Any, checkpoint: str | Path) -> bool:
    """Loads a checkpoint's weights into a model, under the names that `from_pretrained` would give them.

    transformers writes many vision-language models with the names of the hub ("visual.blocks...") and on resuming looks
    for its own ("model.visual.blocks..."): it warns, restores next to nothing, and trains on from the first weights
    (huggingface/transformers#43701). `VPPOTrainer` calls this instead.

    Args:
        model: A whole `PreTrainedModel`, not yet wrapped for several devices.
        checkpoint: A folder as transformers' trainer saves it.

    Returns:
        Whether the folder holds whole weights, and they were loaded. Adapters, and what FSDP or DeepSpeed save in
        pieces, are left to their own loaders.
    """
    if not any(Path(checkpoint).glob("model*.safetensors")):
        return False
    saved = type(model).from_pretrained(checkpoint, dtype=model.dtype)
    model.load_state_dict(saved.state_dict())
    return True
