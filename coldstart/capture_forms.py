"""The forms of a generation's chunks: which are taken from its parent, which are made, and what the manifest says of them.

They are made when all chunks are saved in their own form, from the state as it is then; a form that is stored decodes to
just what its chunk was saved as.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from coldstart.manifest import Form
from coldstart.save.base import Saved

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from coldstart.plan import Extent
    from coldstart.repository import Repository
    from coldstart.save import Saver, Task

_Key = tuple[str, int, int]


class Forms(NamedTuple):
    """The forms of a generation, and how each blob of them came to be there."""

    forms: tuple[Form, ...] = ()
    saved: tuple[Saved, ...] = ()


class Known(NamedTuple):
    """Forms of the parent by the keys of ``plan.known_chunks``. ``stays``: their blobs live as long as this capture does."""

    forms: Mapping[_Key, Form]
    stays: bool


def save_forms(
    chunks: Mapping[int, tuple[Extent, int, Saved]],
    known: Known,
    encoded: Callable[[Extent, Saved], Task | None],
    saver: Saver,
    pace: Callable[[], None],
) -> Forms:
    """Give every chunk its form: the parent's, if that may be relied on, else what ``encoded`` offers, if it offers one.

    ``chunks`` are those in device memory, by their indices, each with the item size of its segment. Equal ones are encoded
    once. Raises what ``Saver.save`` does.
    """
    keys = {
        index: (saved.raw_hash, item_bytes, extent.length_bytes)
        for index, (extent, item_bytes, saved) in chunks.items()
    }
    found: dict[_Key, Saved] = {}
    made: list[_Key] = []

    def tasks() -> Iterator[Task]:
        for key, index in {key: index for index, key in keys.items()}.items():
            pace()
            reused = _reused(known, key, saver.repository)
            if reused is not None:
                found[key] = reused
                continue
            extent, _, saved = chunks[index]
            task = encoded(extent, saved)
            if task is not None:
                made.append(key)
                yield task

    new = saver.save(tasks())
    found.update(zip(made, new, strict=True))
    forms = tuple(_form(index, found[key]) for index, key in keys.items() if key in found)
    return Forms(forms, tuple(found.values()))


def _reused(known: Known, key: _Key, repository: Repository) -> Saved | None:
    """The parent's form of a chunk; where its blob may be a collector's next, only if it is young enough."""
    form = known.forms.get(key)
    if form is None:
        return None
    saved = Saved(key[0], form.codec, form.parameters, form.blob, form.stored_bytes, is_written=False)
    if known.stays:
        return saved
    age_seconds = repository.blob_age_seconds(form.blob, form.stored_bytes)
    if not repository.is_young(age_seconds):
        return None
    return saved._replace(is_settled=repository.is_settled(age_seconds))


def _form(index: int, saved: Saved) -> Form:
    return Form(index, saved.codec, saved.parameters, saved.blob, saved.stored_bytes)
