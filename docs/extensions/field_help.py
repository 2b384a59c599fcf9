"""For the API reference: fields of a dataclass that say in their metadata what they are, as those of TRL do."""

from __future__ import annotations

import ast
from typing import Any

from griffe import Attribute, Class, Docstring, ExprCall, ExprDict, ExprKeyword, Extension


class FieldHelp(Extension):
    """Lists such fields under "Attributes" of their class."""

    def on_class_members(self, *, cls: Class, **kwargs: Any) -> None:
        helps = {
            name: text
            for name, member in cls.members.items()
            if isinstance(member, Attribute) and (text := _help(member))
        }
        if helps and cls.docstring:
            lines = [f"    {name}: {text}" for name, text in helps.items()]
            value = "\n".join([cls.docstring.value, "", "Attributes:", *lines])
            cls.docstring = Docstring(value, lineno=cls.docstring.lineno, endlineno=cls.docstring.endlineno, parent=cls)


def _help(attribute: Attribute) -> str | None:
    call = attribute.value
    for argument in call.arguments if isinstance(call, ExprCall) else ():
        if isinstance(argument, ExprKeyword) and argument.name == "metadata" and isinstance(argument.value, ExprDict):
            entries = zip(argument.value.keys, argument.value.values, strict=True)
            return next((ast.literal_eval(str(value)) for key, value in entries if str(key) == "'help'"), None)
    return None
