"""Processors on machines without torchvision: Qwen-VL's include one for videos, which needs it; images do not."""

from __future__ import annotations

from typing import Any


def without_video(processor_class: type) -> type:
    """The processor class with its video processor left out; it saves under the same name.

    Args:
        processor_class: A class whose arguments are (image_processor, tokenizer, video_processor, chat_template).
    """

    class ImageOnly(processor_class):
        def __init__(
            self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None
        ) -> None:
            super().__init__(image_processor, tokenizer, None, chat_template)

    ImageOnly.__name__ = processor_class.__name__
    return ImageOnly
