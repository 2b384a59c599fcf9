"""What a user can put right."""

from __future__ import annotations


class InputError(ValueError):
    """A config, a file or an option that cannot be used as it is; the message says which, and what would do.

    The command line prints it as one line. Any other exception is a defect of this library and keeps its traceback.
    """
