"""What one process finds out for all processes of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from vppo.errors import InputError

T = TypeVar("T")


def on_first(work: Callable[[], T]) -> T:
    """Does something on the first process alone; all get its result, or its error.

    Folders are looked at this way: every process has the same answer, even if one writes while another looks.

    Args:
        work: Called without arguments; what it returns can be pickled.

    Raises:
        InputError: `work` raised one, or an OSError.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState()
    if state.num_processes == 1:
        return work()
    found: list[Any] = [None, None]
    if state.is_main_process:
        try:
            found[0] = work()
        except (InputError, OSError) as error:
            found[1] = str(error)
    broadcast_object_list(found)
    if found[1] is not None:
        raise InputError(found[1])
    result: T = found[0]
    return result
