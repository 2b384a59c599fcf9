"""Text-only forwards beside others with images, of a model that several processes share.

A sharded model gathers its weights block by block, and every process must join. So where one process shows images, all
pass the vision tower; those without any show it a black one, times 0.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils._pytree import tree_leaves

from vppo.views import process_of

SIDE = 56  # pixels of the black image, unless the processor enlarges it


class JoinedImages:
    """Hooks on a model: in a forward without images of which another process has some, a black image passes too.

    Hidden states stay what they are. The vision tower's weights have gradients of 0 then, as where there are images
    without a signal.

    Args:
        model: A vision-language model, or one with adapters around it. Every process calls its forward equally often.
        processor: Of the model.
        most: From a count of this process to the largest of all.
    """

    def __init__(self, model: Any, processor: Any, most: Callable[[int], int]) -> None:
        self._processor, self._most = processor, most
        self._black: dict[str, Any] | None = None
        inner = getattr(model, "get_base_model", lambda: model)()
        self._owner: Any = next((m for m in inner.modules() if hasattr(m, "get_image_features")), None)
        if self._owner is None:
            return
        self._embeddings = inner.get_input_embeddings()
        inner.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Every process comes by here with each forward."""
        pixels = kwargs.get("pixel_values")
        shows = pixels is not None and len(pixels) > 0
        if self._most(int(shows)) and not shows:
            # only now, to come behind FSDP's own hooks: blocks must end in the order that they have with images
            self._handle = self._embeddings.register_forward_hook(self._join)

    def _join(self, module: Any, args: Any, embedded: Tensor) -> Tensor:
        self._handle.remove()
        if self._black is None:
            names = inspect.signature(self._owner.get_image_features).parameters
            shown = process_of(self._processor)([[Image.new("RGB", (SIDE, SIDE))]])
            self._black = {name: torch.as_tensor(value) for name, value in shown.items() if name in names}
        features = self._owner.get_image_features(**{k: v.to(embedded.device) for k, v in self._black.items()})
        nothing = sum((x * 0).sum() for x in tree_leaves(tuple(features.values())) if isinstance(x, Tensor))
        return embedded + torch.as_tensor(nothing).to(embedded)
