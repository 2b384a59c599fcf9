"""The native libraries: where they are, what they were built with, and why one is not there.

`setup.py` builds them into `lib/` and notes the outcome in `lib/build.json`. VPPO_KERNELS_LIB names another folder.
"""

from __future__ import annotations

import json
import os
import stat
import struct
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any

EXPORTED = (  # by the library of every device
    "fold",
    "fold_pair",
    "fold_jsd",
    "gradient",
    "gradient_pair",
    "topk_mask",
)


def folder() -> Path:
    """Where the libraries are looked for."""
    return Path(os.environ.get("VPPO_KERNELS_LIB") or Path(__file__).parent / "lib")


def _record(device_type: str) -> dict[str, Any]:
    """What the build has noted of a library; `why` there is none, if nothing can be read."""
    path = folder() / "build.json"
    try:
        found = json.loads(path.read_text())[device_type]
    except FileNotFoundError:
        return {"why": "this copy of vppo_kernels was not installed by pip"}
    except KeyError:
        return {"why": f"there is none for device type {device_type!r}"}
    except (OSError, ValueError, TypeError) as error:
        return {"why": f"{path} cannot be read: {error}"}
    return found if isinstance(found, dict) else {"why": f"{path} holds no record of a build"}


def _outdated() -> bool:
    """Whether the sources of a development tree are newer than its library."""
    sources, built = Path(__file__).parents[1] / "csrc", folder() / "build.json"
    if not (sources / "bindings.cpp").is_file() or folder().parent != Path(__file__).parent:
        return False  # a folder of that name beside an installed package is somebody else's
    newest = max(path.stat().st_mtime for path in sources.rglob("*") if path.is_file())
    return not built.is_file() or newest > built.stat().st_mtime


def _not_trusted(path: Path) -> str:
    """Why a library must not be loaded, as it can run anything; "" if it may be."""
    if not folder().is_dir():
        return f"{folder()} is not a folder"
    for each in (folder(), path):
        if each.stat().st_mode & stat.S_IWOTH:
            return f"anybody may write to {each}"
    return ""


def _damage(path: Path) -> str:
    """Why a file cannot be our library; "" if it can. One that is cut off could crash the process later."""
    data = path.read_bytes()
    header = struct.Struct("<4s2B10x2HI3QI6H")  # of ELF in 64 bits, little-endian
    if len(data) < header.size or data[:4] != b"\x7fELF":
        return "it is not a shared library" if sys.platform == "linux" else ""
    if data[4:6] != b"\x02\x01":
        return "it is not for a machine of 64 bits"
    fields = header.unpack_from(data)
    segments, sections, size, count, section_size, section_count = fields[7], fields[8], *fields[11:15]
    end = sections + section_size * section_count
    for index in range(count):
        at = segments + index * size
        if at + 56 > len(data):
            return "it is cut off"
        offset, length = struct.unpack_from("<Q", data, at + 8)[0], struct.unpack_from("<Q", data, at + 32)[0]
        end = max(end, offset + length)
    if end > len(data):
        return "it is cut off"
    # names are looked for in the file, as loading somebody else's library would already run it
    lacking = [name for name in EXPORTED if f"\0__tvm_ffi_{name}\0".encode() not in data]
    return f"it is another library, without {', '.join(lacking)}" if lacking else ""


@cache
def _load(device_type: str) -> tuple[Any, str]:
    """The library of a device type and "", or None and why there is none."""
    path = folder() / f"libvppo_{device_type}.so"
    try:
        if reason := _not_trusted(path) if path.exists() or not folder().is_dir() else "":
            return None, f"the native library is not loaded: {reason}"
        if not path.exists():
            return None, f"the native library was not built: {_record(device_type).get('why', f'{path} is gone')}"
        if _outdated():
            reason = "csrc/ has changed since the native library was built: install again (pip install -e .)"
            warnings.warn(reason, stacklevel=2)
            return None, reason
        if reason := _damage(path):
            return None, f"the native library cannot be loaded: {path}: {reason}"
    except OSError as error:
        return None, f"the native library cannot be loaded: {error}"
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
