"""What to install where a package that a part of `vppo` needs is missing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, requires

from vppo.errors import InputError

IMPORTED_AS = {  # where the two names differ
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "transfer_queue": "TransferQueue",
    "yaml": "pyyaml",
    "zmq": "pyzmq",
}


class MissingExtraError(InputError, ImportError):
    """A package of an extra is not installed; the message says how to get it."""


def extra_of(package: str) -> str | None:
    """The extra of this distribution that declares a package, by the name it is imported under; None if none does."""
    name = IMPORTED_AS.get(package, package).replace("_", "-").lower()
    try:
        declared = requires("vppo-kernels") or []
    except PackageNotFoundError:  # a copy that was never installed
        return None
    for requirement in declared:
        match = re.match(r"""([\w.-]+).*extra == ['"]([\w-]+)['"]""", requirement)
        if match and match[1].replace("_", "-").lower() == name:
            return match[2]
    return None


@contextmanager
def named_extras() -> Iterator[None]:
    """Turns an import that fails for want of a declared package into an error that names the extra with it.

    Raises:
        MissingExtraError: A package is missing that an extra brings. Other failing imports pass as they are.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = extra_of(package)
        if extra is None:
            raise
        raise MissingExtraError(
            f"this part of vppo needs {package!r}, which is not installed: pip install 'vppo-kernels[{extra}]'"
        ) from error
