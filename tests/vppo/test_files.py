import errno
import os
import secrets
from pathlib import Path

import pytest

from vppo.errors import InputError
from vppo.files import make_folder, replacing, write_atomic, writing
from vppo.locks import claimed


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


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError) as caught:
        write_atomic(tmp_path / "x.json", "new")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "x.json"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_are_those_of_a_plain_open(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        (tmp_path / "plain").write_text("x")
        write_atomic(tmp_path / "atomic", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "plain").stat().st_mode == (tmp_path / "atomic").stat().st_mode


def test_planted_links_are_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The temporary name cannot be guessed; and where it is, nothing is written through what stands there."""
    (tmp_path / "victim").write_text("mine")
    for guess in (f".x.{os.getpid()}.tmp", ".x.tmp"):
        (tmp_path / guess).symlink_to(tmp_path / "victim")
    names: list[str] = []
    for _ in range(2):
        with replacing(tmp_path / "x") as file:
            names.append(str(file.name))
            file.write(b"new")
    assert len(set(names)) == 2

    monkeypatch.setattr(secrets, "token_hex", lambda size: "guessed")
    (tmp_path / ".x.guessed.tmp").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError):
        write_atomic(tmp_path / "x", "through")
    assert (tmp_path / "victim").read_text() == "mine" and (tmp_path / "x").read_text() == "new"


def test_a_link_in_place_of_the_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "x").symlink_to(tmp_path / "victim")
    write_atomic(tmp_path / "x", "new")
    assert (tmp_path / "victim").read_text() == "mine" and (tmp_path / "x").read_text() == "new"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a file system in which no folder can be made")
def test_a_place_without_folders_is_a_refusal_and_no_defect(tmp_path: Path) -> None:
    """There mkdir says that a file is missing, as it would of one of ours."""
    for path in (Path("/proc/nope/run"), Path("/proc/nope")):
        with pytest.raises(PermissionError, match=f"no folder can be made there: '{path}'"):
            make_folder(path)
        with pytest.raises(PermissionError), claimed(path, "--out"):
            pass
    with pytest.raises(PermissionError, match="no file can be made there: '/proc'"), claimed(Path("/proc"), "--out"):
        pass  # a folder that is there, and says the same of a new file
    with pytest.raises(PermissionError):
        write_atomic("/proc/nope/comparison.json", "{}")
    make_folder(tmp_path / "new" / "folder")
    make_folder(tmp_path / "new" / "folder")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "in"):
        with pytest.raises(NotADirectoryError):
            make_folder(path)


def test_what_a_disk_refuses_is_told_from_defects(tmp_path: Path) -> None:
    import torch

    target = tmp_path / "out"
    said = r"out: cannot be written: No space left on device.*; make room"
    with pytest.raises(InputError, match=said), writing(target, "make room"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(InputError, match=r"out: cannot be written: .*inline_container.cc"), writing(target):
        torch.save(torch.zeros(1 << 16), "/dev/full")
    for defect in (RuntimeError("shapes differ"), KeyError("x"), FileNotFoundError(errno.ENOENT, "no such file")):
        with pytest.raises(type(defect)), writing(target):
            raise defect
