"""The native libraries: where they are, what they were built with, and why one is not there.

`setup.py` builds them into `lib/` and notes the outcome in `lib/build.json`. VPPO_KERNELS_LIB names another folder.
"""

from __future__ import annotations

import json
import os
import warnings
from functools import cache
from pathlib import Path
from typing import Any


def folder() -> Path:
    """Where the libraries are looked for."""
    return Path(os.environ.get("VPPO_KERNELS_LIB") or Path(__file__).parent / "lib")


def _record(device_type: str) -> dict[str, Any]:
    try:
        return json.loads((folder() / "build.json").read_text())[device_type]
    except FileNotFoundError:
        return {"why": "this copy of vppo_kernels was not installed by pip"}
    except KeyError:
        return {"why": f"there is none for device type {device_type!r}"}


def _outdated() -> bool:
    """Whether the sources of a development tree are newer than its library."""
    sources, built = Path(__file__).parents[1] / "csrc", folder() / "build.json"
    if not sources.is_dir() or folder().parent != Path(__file__).parent:
        return False
    newest = max(path.stat().st_mtime for path in sources.rglob("*") if path.is_file())
    return newest > built.stat().st_mtime


@cache
def _load(device_type: str) -> tuple[Any, str]:
    """The library of a device type and "", or None and why there is none."""
    path = folder() / f"libvppo_{device_type}.so"
    if not path.exists():
        return None, f"the native library was not built: {_record(device_type).get('why', f'{path} is gone')}"
    if _outdated():
        reason = "csrc/ has changed since the native library was built: install again (pip install -e .)"
        warnings.warn(reason, stacklevel=2)
        return None, reason
    # torch since 2.10 hands tensors over by itself; for older ones this would compile an extension at import
    os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")
    try:
        import tvm_ffi

        return tvm_ffi.load_module(path), ""
    except (ImportError, RuntimeError, OSError) as error:
        return None, f"the native library cannot be loaded: {error}"


def missing(device_type: str) -> str:
    """Why there is no library for this type of device; "" if there is."""
    return _load(device_type)[1]


def library(device_type: str) -> Any:
    """The exported functions for "cpu" or "cuda", as attributes.

    Raises:
        RuntimeError: There is no such library; the message says why.
    """
    loaded, reason = _load(device_type)
    if loaded is None:
        raise RuntimeError(reason)
    return loaded


def built_by(device_type: str) -> str:
    """The compiler that made the library."""
    return _record(device_type).get("by", "an unknown compiler")
