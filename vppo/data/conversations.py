"""Problems as conversations, with their images where they belong."""

from __future__ import annotations

from typing import Any

from vppo.data.bad_rows import Where
from vppo.data.options import DataOptions

IMAGE_MARK = "<image>"
ROLES = ("system", "user", "assistant", "tool")

Message = dict[str, Any]


def conversation(value: Any, images: int, column: str, where: Where, options: DataOptions) -> list[Message]:
    """The messages of a problem, whose contents are lists of parts.

    A text becomes the user's message, after the system prompt and before the instruction; messages stay as they are.
    Where the text says `<image>`, once for each image, they stand there; otherwise before it.

    Args:
        value: A text, or a list of messages.
        images: How many images the row has.
        column: Where the value comes from.
        where: Which row it is in.
        options: System prompt and instruction.

    Raises:
        BadRowError: It is empty, it is neither a text nor messages, or it has places for more or fewer images.
    """
    if isinstance(value, list | tuple) and value:
        return _with_images([_message(message, column, where) for message in value], images, column, where)
    if value is not None and not isinstance(value, str | list | tuple):
        raise where.bad(column, f"takes text or messages, got {type(value).__name__}: {value!r:.80}")
    problem = value.strip() if isinstance(value, str) else ""
    if not problem:
        raise where.bad(column, "it is empty")
    user = _with_images([{"role": "user", "content": [_part(problem)]}], images, column, where)
    parts = user[0]["content"]
    if options.instruction:
        if parts[-1]["type"] == "text":
            parts[-1] = _part(f"{parts[-1]['text']} {options.instruction}")
        else:
            parts.append(_part(f" {options.instruction}"))
    parts[-1] = {**parts[-1], "text": parts[-1]["text"] and parts[-1]["text"].rstrip()}
    system = [{"role": "system", "content": [_part(options.system_prompt)]}] if options.system_prompt else []
    return [*system, *user]


def texts(messages: list[Message]) -> list[str]:
    """Every text of a conversation."""
    found = []
    for message in messages:
        content = message["content"]
        found += [content] if isinstance(content, str) else [p["text"] for p in content if p["type"] == "text"]
    return found


def _message(message: Any, column: str, where: Where) -> Message:
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ROLES:
        raise where.bad(column, f"a message has a role, one of {', '.join(ROLES)}, and content; got {message!r:.80}")
    content = message.get("content")
    if isinstance(content, str):
        return {"role": role, "content": [_part(content)]}
    if not isinstance(content, list) or not content:
        raise where.bad(column, f"a message's content is text or a list of parts, got {content!r:.80}")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append(_part(part["text"]))
        elif kind == "image" and part.get("image") is None:
            parts.append(_part(None))
        elif kind == "image":
            raise where.bad(column, "an image is inside a message; takes it in a column of its own")
        else:
            raise where.bad(column, f"a part is a text or the place of an image, got {part!r:.80}")
    return {"role": role, "content": parts}


def _with_images(messages: list[Message], images: int, column: str, where: Where) -> list[Message]:
    """The messages with a place for each image."""
    places = sum(part["type"] == "image" for message in messages for part in message["content"])
    marks = 0 if places else sum(text.count(IMAGE_MARK) for text in texts(messages))
    if marks:
        if marks != images:
            raise where.bad(
                column,
                f"it says {IMAGE_MARK} {marks} times for {images} images; once for each, or not at all",
            )
        return [{**message, "content": _split(message["content"])} for message in messages]
    if not places and images:
        user = next((message for message in messages if message["role"] == "user"), None)
        if user is None:
            raise where.bad(column, f"it has {images} images and no user's message that they could stand in")
        user["content"] = [_part(None)] * images + user["content"]
    elif places != images:
        raise where.bad(column, f"it has places for {places} images, the row has {images}")
    return messages


def _split(parts: list[Message]) -> list[Message]:
    """The parts with an image for each mark."""
    found = []
    for part in parts:
        first, *rest = (part["text"] or "").split(IMAGE_MARK)
        found.append(_part(first))
        for text in rest:
            found += [_part(None), _part(text)]
    return [part for part in found if part["text"] != ""]


def _part(text: str | None) -> Message:
    return {"type": "image" if text is None else "text", "text": text}
