"""Programs that could not be made: what is remembered, for whom, and when it is tried again."""

from __future__ import annotations

import json

import pytest

from coldstart import refusals
from coldstart.refusals import MAX_REASON, note_refusal, refusal
from coldstart.stores.memory import MemoryStore
from tests.generations import KEY, OTHER_KEY


def test_remembered_for_its_key_and_program() -> None:
    """Whoever wants the same program of the same code is told the reason; for other code, names and wishes there is none."""
    store = MemoryStore()
    assert refusal(store, "model", KEY, "p-1") == ""
    note_refusal(store, "model", KEY, "p-1", "line 7")
    assert refusal(store, "model", KEY, "p-1") == "line 7"
    others = [("model", OTHER_KEY, "p-1"), ("other", KEY, "p-1"), ("model", KEY, "p-2")]
    assert [refusal(store, *other) for other in others] == ["", "", ""]
    note_refusal(store, "model", KEY, "p-1", "line 9" + "x" * MAX_REASON)
    assert len(refusal(store, "model", KEY, "p-1")) == MAX_REASON


def test_other_versions_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """With another version of what makes programs the refusal holds no longer."""
    store = MemoryStore()
    note_refusal(store, "model", KEY, "p-1", "line 7")
    monkeypatch.setattr(refusals, "VERSION", "999")
    assert refusal(store, "model", KEY, "p-1") == ""


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b'{"reason": "x"}', b'{"versions": {}}', b"\xff"])
def test_damaged_notes(data: bytes) -> None:
    """A note that somebody damaged is none: the program is tried."""
    store = MemoryStore()
    note_refusal(store, "model", KEY, "p-1", "line 7")
    (note,) = store.list("refusals/")
    store.put(note.key, data)
    assert refusal(store, "model", KEY, "p-1") == ""


def test_what_a_note_says() -> None:
    """The note tells the reason, the versions and when, for whoever looks into the store."""
    store = MemoryStore()
    note_refusal(store, "model", KEY, "p-1", "line 7")
    document = json.loads(store.get(f"refusals/model/{KEY.digest}/p-1").data)
    assert (document["reason"], set(document)) == ("line 7", {"reason", "versions", "created_seconds"})
    assert document["versions"]["torch"]
