"""Whether a tokenizer can write what the instruction asks for."""

from __future__ import annotations

from typing import Any

from vppo.rewards.format import CLOSING, OPENING


def think_warning(tokenizer: Any, instruction: str) -> str | None:
    """What to know where the instruction asks for `<think>` and the tokenizer has no such token; else None.

    A model that was never trained on the tag as one token writes it in pieces, or not at all, and earns no format
    reward; a special token is left out of the text, which earns none either.
    """
    if OPENING not in instruction:
        return None
    for tag in (OPENING, CLOSING):
        ids = tokenizer(tag, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            return (
                f"{tag} is not a token of this tokenizer ({len(ids)} tokens): a model may write it in pieces or leave "
                "it out, and then earns no format reward; see the share of answers in the form that was asked for"
            )
        if ids[0] in tokenizer.all_special_ids:
            return (
                f"{tag} is a special token of this tokenizer, which decoded answers leave out: they never have the "
                "form that was asked for, and earn no format reward"
            )
    return None
