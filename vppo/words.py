"""Words of the command line, and YAML, as the values that people mean by them."""

from __future__ import annotations

import re
import types
import typing
from typing import Any

import yaml

INT, FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"


class _Loader(yaml.SafeLoader):
    """YAML with numbers as people write them: `1e-6` is one, `010` is ten, `1:30` is not ninety."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag not in (INT, FLOAT)]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_NUMBER_STARTS = list("-+.0123456789")
_Loader.add_implicit_resolver(INT, re.compile(r"[-+]?\d[\d_]*$"), _NUMBER_STARTS)
_Loader.add_implicit_resolver(
    FLOAT,
    re.compile(r"[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?$|[-+]?\d+[eE][-+]?\d+$|[-+]?\.inf$|\.nan$"),
    _NUMBER_STARTS,
)
_Loader.add_constructor(INT, lambda loader, node: int(node.value.replace("_", "")))


def load_yaml(text: str) -> Any:
    """What a YAML document holds; numbers are decimal.

    Raises:
        yaml.YAMLError, ValueError: It is no YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def parse_word(text: str, hint: Any) -> Any:
    """A word of the command line as a value of its key's type, or as it is where it is none.

    Args:
        text: The word. Where the key takes text, it is that text; but `null`, `true`, `false`, a whole number, or a
            list or mapping in YAML is what it says where the key takes that, too.
        hint: The key's type hint.

    Raises:
        yaml.YAMLError, ValueError: The key takes no text, and the word is not valid YAML.
    """
    kinds = _kinds(hint)
    if text == "null" and type(None) in kinds:
        return None
    if text in ("true", "false") and bool in kinds:
        return text == "true"
    if text[:1] in ("[", "{") and any(kind in kinds for kind in (list, dict)):
        return load_yaml(text)
    if str in kinds:
        return int(text) if int in kinds and re.fullmatch(r"[-+]?\d+", text) else text
    return text if len(text.split()) > 1 else load_yaml(text or "''")  # YAML would take `3 #4` for 3


def _kinds(hint: Any) -> set[Any]:
    """The types that a hint allows, of lists and mappings the outermost."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return {kind for argument in arguments for kind in _kinds(argument)}
    return {type(choice) for choice in arguments} if origin is typing.Literal else {origin or hint}
