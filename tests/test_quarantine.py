"""Notes about bad generations: they hold for a while, are lifted by good ones, and are never in a start's way."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from coldstart.quarantine import HOLDS_SECONDS, Quarantine
from coldstart.testing import FakeClock

if TYPE_CHECKING:
    from pathlib import Path

BAD = "manifests/model/000002-0a"
OTHER = "manifests/model/000001-0b"


def test_a_note_is_of_one_generation_of_one_store(tmp_path: Path) -> None:
    """Another generation, and the same key in another store, have none."""
    here = Quarantine(str(tmp_path), "s3://a")
    here.note(BAD, "altered")
    assert here.reason(BAD) == "altered"
    assert here.reason(OTHER) == Quarantine(str(tmp_path), "s3://b").reason(BAD) == ""


def test_a_note_holds_for_a_day(tmp_path: Path) -> None:
    """After that the generation is tried first again: somebody may have mended it."""
    clock = FakeClock()
    quarantine = Quarantine(str(tmp_path), "s3://a", clock=clock.time)
    quarantine.note(BAD, "altered")
    clock.sleep(HOLDS_SECONDS - 1)
    assert quarantine.reason(BAD)
    assert quarantine.has_notes("model")
    clock.sleep(1)
    assert (quarantine.reason(BAD), quarantine.has_notes("model")) == ("", False)


def test_lifting_and_clearing_leave_no_folder(tmp_path: Path) -> None:
    """Whoever looks for notes sees a folder only while there are some."""
    quarantine, elsewhere = Quarantine(str(tmp_path), "s3://a"), Quarantine(str(tmp_path), "s3://b")
    assert not quarantine.has_notes("model")
    quarantine.note(BAD, "altered")
    quarantine.note(OTHER, "altered")
    assert quarantine.has_notes("model")
    assert quarantine.lift(BAD)
    assert not quarantine.lift(BAD)
    elsewhere.note(BAD, "altered")
    quarantine.clear("model")
    assert (quarantine.reason(OTHER), elsewhere.reason(BAD)) == ("", "altered")
    assert (quarantine.has_notes("model"), elsewhere.has_notes("model")) == (False, True)
    elsewhere.clear("model")
    assert not quarantine.has_notes("model")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"reason": 1}', '{"reason": "x", "noted_seconds": "soon"}'])
def test_what_is_no_note_is_none(tmp_path: Path, text: str) -> None:
    """A file that was cut off or altered says nothing."""
    quarantine = Quarantine(str(tmp_path), "s3://a")
    quarantine.note(BAD, "altered")
    (path,) = (tmp_path / ".quarantine" / "model").iterdir()
    path.write_text(text)
    assert quarantine.reason(BAD) == ""


def test_where_nothing_can_be_written_there_are_no_notes(tmp_path: Path) -> None:
    """A file in the folder's place is no reason to fail."""
    (tmp_path / "file").touch()
    quarantine = Quarantine(str(tmp_path / "file"), "s3://a")
    quarantine.note(BAD, "altered")
    quarantine.clear("model")
    assert (quarantine.reason(BAD), quarantine.has_notes("model"), quarantine.lift(BAD)) == ("", False, False)


def test_a_note_is_this_users(tmp_path: Path) -> None:
    """Its folder is readable by this user alone, and a long reason is cut."""
    quarantine = Quarantine(str(tmp_path), "s3://a")
    quarantine.note(BAD, "x" * 10_000)
    assert os.stat(tmp_path / ".quarantine" / "model").st_mode & 0o077 == 0
    assert len(quarantine.reason(BAD)) == 1000
