"""How the text of a token is shown."""

from __future__ import annotations

import re

_SPECIAL = re.compile(r"<\|[^|]+\|>|</?s>|<(?:bos|eos|pad|unk|start_of_turn|end_of_turn|end_of_utterance)>")


def is_special(token: str) -> bool:
    """Whether a token is a mark of the chat format, such as `<|im_end|>`, and no text."""
    return _SPECIAL.fullmatch(token) is not None


def visible(token: str) -> str:
    """A token's text for showing on one line: control characters have a visible sign, an empty token too."""
    shown = token.replace("\n", "↵").replace("\t", "⇥")
    return "".join(c if c == " " or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in shown) or "∅"
