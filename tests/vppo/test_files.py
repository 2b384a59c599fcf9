import os
from pathlib import Path

import pytest

from vppo.files import write_atomic


def test_writes_text_and_bytes_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    assert write_atomic(path, "größe\n") == path
    assert path.read_bytes() == "größe\n".encode()
    write_atomic(path, b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_atomic(tmp_path / "x.json", "old")

    def full_disk(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_other_content_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="content must be str or bytes, got dict"):
        write_atomic(tmp_path / "x", {})  # type: ignore[arg-type]
