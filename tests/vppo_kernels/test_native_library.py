"""Damaged, foreign and untrusted native libraries: one clear reason, and never the end of the process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vppo_kernels import native_library

BUILT = native_library.folder()
pytestmark = pytest.mark.skipif(
    bool(native_library.missing("cpu")) or not (BUILT / "build.json").exists(), reason="no native library of a build"
)


@pytest.fixture
def lib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A good copy, of which a test spoils something."""
    folder = tmp_path / "lib"
    folder.mkdir(mode=0o755)
    for name in ("libvppo_cpu.so", "build.json"):
        shutil.copy(BUILT / name, folder / name)
    monkeypatch.setenv("VPPO_KERNELS_LIB", str(folder))
    return folder


def reason() -> str:
    return native_library._load.__wrapped__("cpu")[1]


def test_a_good_copy_is_loaded(lib: Path) -> None:
    assert reason() == ""
    (lib / "build.json").unlink()
    assert reason() == "" and native_library.built_by("cpu") == "an unknown compiler"


@pytest.mark.parametrize("record", ["", "{", "[]", "3", '{"cpu": 3}', "null", "\udcff"])
def test_a_spoilt_record_is_no_obstacle(lib: Path, record: str) -> None:
    (lib / "build.json").write_bytes(record.encode(errors="surrogateescape"))
    assert reason() == "" and native_library.built_by("cpu") == "an unknown compiler"
    (lib / "libvppo_cpu.so").unlink()
    assert reason().startswith("the native library was not built: ")


FOREIGN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "not a shared library"),
    "text": (lambda data: b"not a library at all" * 10, "not a shared library"),
    "header only": (lambda data: data[:64], "cut off"),
    "half": (lambda data: data[: len(data) // 2], "cut off"),
    "all but a page": (lambda data: data[:-4096], "cut off"),
    "nothing behind the header": (lambda data: data[:64] + bytes(len(data) - 64), "cannot be loaded"),
}


@pytest.mark.parametrize(("change", "words"), FOREIGN.values(), ids=FOREIGN)
def test_a_damaged_library_is_left_alone(lib: Path, change: Callable[[bytes], bytes], words: str) -> None:
    """In a process of its own, which a mapped file that ends too early would kill."""
    path = lib / "libvppo_cpu.so"
    path.write_bytes(change(path.read_bytes()))
    code = "from vppo_kernels import native_library; print(native_library.missing('cpu'))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-1000:]
    assert run.stdout.startswith("the native library cannot be loaded: ") and words in run.stdout


def test_another_library_is_not_taken_for_ours(lib: Path) -> None:
    import tvm_ffi.libinfo

    shutil.copy(tvm_ffi.libinfo.find_libtvm_ffi(), lib / "libvppo_cpu.so")
    assert "is another library, without fold, fold_pair" in reason()


def test_a_folder_that_anybody_may_write_to_is_not_trusted(lib: Path) -> None:
    lib.chmod(0o777)
    assert reason() == f"the native library is not loaded: anybody may write to {lib}"
    lib.chmod(0o755)
    (lib / "libvppo_cpu.so").chmod(0o757)
    assert reason() == f"the native library is not loaded: anybody may write to {lib / 'libvppo_cpu.so'}"


def test_a_file_is_no_folder(lib: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (lib / "build.json", lib / "nowhere"):
        monkeypatch.setenv("VPPO_KERNELS_LIB", str(place))
        assert reason() == f"the native library is not loaded: {place} is not a folder"


@pytest.mark.parametrize("sources", ["empty", "somebody else's"])
def test_a_foreign_folder_of_sources_beside_it(lib: Path, monkeypatch: pytest.MonkeyPatch, sources: str) -> None:
    package = lib.parent / "vppo_kernels"
    package.mkdir()
    shutil.move(lib, package / "lib")
    (lib.parent / "csrc").mkdir()
    if sources != "empty":
        (lib.parent / "csrc" / "main.c").touch()
        os.utime(package / "lib" / "build.json", (100, 100))
    monkeypatch.delenv("VPPO_KERNELS_LIB")
    monkeypatch.setattr(native_library, "__file__", str(package / "native_library.py"))
    assert reason() == ""
