"""For the API reference: fields of a dataclass that say in their metadata what they are, as those of TRL do."""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from typing import Any

from griffe import Class, Docstring, Extension


class FieldHelp(Extension):
    """Lists such fields under "Attributes" of their class."""

    def on_class_members(self, *, cls: Class, **kwargs: Any) -> None:
        if not cls.docstring or not any("'help'" in str(member.value) for member in cls.attributes.values()):
            return
        described = getattr(import_module(cls.module.path), cls.name)  # a help may be put together when it is imported
        helps = {
            field.name: field.metadata["help"]
            for field in fields(described)
            if field.name in cls.attributes and "help" in field.metadata
        }
        lines = [f"    {name}: {text}" for name, text in helps.items()]
        value = "\n".join([cls.docstring.value, "", "Attributes:", *lines])
        cls.docstring = Docstring(value, lineno=cls.docstring.lineno, endlineno=cls.docstring.endlineno, parent=cls)
