"""The folders in which programs are made: one a program, gone afterwards, also after a worker that was killed."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from typing import TYPE_CHECKING

import pytest

from coldstart.cli.errand import want_of_room
from coldstart.errors import ExportError
from coldstart.program_making import making_folder

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, this test's own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_folder_of_ones_own(temporary: Path) -> None:
    """A folder that only this user can look into; with whatever is in it it goes at the end, also after an error."""
    for error in (None, OSError):
        folder = ""
        try:
            with making_folder() as folder:
                assert os.stat(folder).st_mode & 0o777 == 0o700
                os.mkdir(f"{folder}/deep")
                (temporary / folder / "deep" / "file").touch()
                if error is not None:
                    raise error
        except OSError:
            pass
        assert folder
        assert not os.path.exists(folder)


def test_what_a_killed_worker_left(temporary: Path) -> None:
    """Folders that nobody holds any more are removed; those of workers at work, new ones and other things stay."""
    left, held, new = (temporary / f"coldstart-program-{name}" for name in ("left", "held", "new"))
    other = temporary / "coldstart-something"
    elsewhere = temporary / "elsewhere"
    for folder in (left, held, new, other, elsewhere):
        folder.mkdir()
        (folder / "0.onnx").touch()
    link = temporary / "coldstart-program-link"
    link.symlink_to(elsewhere)
    for folder in (left, held, other, elsewhere):
        os.utime(folder, (1, 1))
    os.utime(link, (1, 1), follow_symlinks=False)
    lock = os.open(held, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with making_folder() as folder:
        assert not left.exists()
        assert all((each / "0.onnx").exists() for each in (held, new, other, elsewhere))
        assert link.is_symlink()
        os.utime(folder, (1, 1))
        with making_folder():
            assert os.path.isdir(folder)
    os.close(lock)


def raised(error: Exception, cause: Exception | None = None) -> Exception:
    """The error as it is when it was raised from ``cause``."""
    error.__cause__ = cause
    return error


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FULL, "OSError: [Errno 28] No space left on device"),
        (raised(ExportError("it cannot be exported"), FULL), "OSError: [Errno 28] No space left on device"),
        (
            raised(ExportError("no"), RuntimeError("write: No space left on device")),
            "RuntimeError: write: No space left",
        ),
        (raised(ExportError("no"), MemoryError("too much")), "MemoryError: too much"),
        (raised(ExportError("it cannot be exported"), OSError(errno.ENOENT, "No such file")), ""),
        (ExportError("it cannot be exported"), ""),
    ],
)
def test_want_of_room(error: Exception, said: str) -> None:
    """A full disk is told from what is wrong with a program: the first is this machine's, and is not noted for all."""
    found = want_of_room(error)
    assert found.startswith(said)
    assert bool(found) == bool(said)
