"""Claims on folders: one process at a time, whatever becomes of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vppo.errors import InputError
from vppo.locks import LOCK_FILE, claimed

HOLD = "import sys\nfrom pathlib import Path\nfrom vppo.locks import claimed\n" + (
    "with claimed(Path(sys.argv[1]), 'out'):\n    print('held', flush=True)\n    sys.stdin.read()\n"
)


def hold(folder: Path) -> subprocess.Popen[str]:
    """Another process that holds a folder until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


def test_another_process_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = hold(folder)
    said = rf"^out: {folder} is in use by process {process.pid} on .*; wait until"
    with pytest.raises(InputError, match=said), claimed(folder, "out"):
        pass
    process.communicate("", timeout=60)
    assert process.returncode == 0 and not folder.exists()
    with claimed(folder, "out"):
        assert folder.is_dir()


def test_the_claim_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    process = hold(tmp_path / "run")
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert (tmp_path / "run" / LOCK_FILE).exists()
    with claimed(tmp_path / "run", "out"):
        assert str(os.getpid()) in (tmp_path / "run" / LOCK_FILE).read_text()


def test_the_same_process_does_not_get_it_twice(tmp_path: Path) -> None:
    with claimed(tmp_path, "out"), pytest.raises(InputError, match="in use by process"), claimed(tmp_path, "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_only_an_empty_folder_of_its_own_is_removed(tmp_path: Path) -> None:
    with claimed(tmp_path / "a" / "b", "out"):
        pass
    assert not (tmp_path / "a").exists()
    with claimed(tmp_path / "a" / "b", "out"):
        (tmp_path / "a" / "b" / "file").touch()
    (tmp_path / "given").mkdir()
    with pytest.raises(RuntimeError), claimed(tmp_path / "given", "out"):
        raise RuntimeError
    assert {path.name for path in tmp_path.rglob("*")} == {"a", "b", "file", "given"}


def test_who_had_it_removes_the_file_between_opening_and_locking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock on a file without a name would keep nobody out."""
    import fcntl

    flock, calls = fcntl.flock, []

    def late(descriptor: int, how: int) -> None:
        if not calls:
            (tmp_path / LOCK_FILE).unlink()
        calls.append(descriptor)
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with claimed(tmp_path, "out"):
        assert len(calls) == 2 and (tmp_path / LOCK_FILE).exists()
        with pytest.raises(InputError, match="in use"), claimed(tmp_path, "out"):
            pass


def test_a_file_and_a_planted_link_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    said = r"out: .*file is a file; takes a new or empty folder"
    with pytest.raises(InputError, match=said), claimed(tmp_path / "file", "out"):
        pass
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for path, there in (("link", "link is a link to what is not there"), ("link/in", "link is a"), ("file/in", said)):
        with pytest.raises(InputError, match=there), claimed(tmp_path / path, "out"):
            pass
    (tmp_path / LOCK_FILE).symlink_to(tmp_path / "file")
    with pytest.raises(OSError, match="symbolic links"), claimed(tmp_path, "out"):
        pass
    assert (tmp_path / "file").read_text() == "a file"


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import errno
    import fcntl

    def none(descriptor: int, how: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "flock", none)
    with claimed(tmp_path, "out"):
        pass
    assert "cannot be locked" in caplog.text
