"""What is known of processors: how they are built without torchvision, and which tokens stand for images."""

from __future__ import annotations

from typing import Any

PLACEHOLDERS = ("image", "video", "audio", "vision", "media")


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


def placeholder_tokens(config: Any) -> list[int]:
    """Tokens that stand for images in a prompt: a model that reads one in a response looks for another image."""
    suffixes = ("_token_id", "_token_index")
    return sorted(
        {
            value
            for name, value in config.to_dict().items()
            if isinstance(value, int) and name.startswith(PLACEHOLDERS) and name.endswith(suffixes)
        }
    )
