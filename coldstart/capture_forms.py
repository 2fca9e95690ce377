"""The forms of a generation's chunks: which are taken from its parent, which are made, and what the manifest says of them.

They are made when all chunks are saved in their own form, from the state as it is then; a form that is stored decodes to
just what its chunk was saved as.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from coldstart.manifest import Form

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from coldstart.plan import Extent
    from coldstart.save import Saved, Saver, Task

_Key = tuple[str, int, int]


class Forms(NamedTuple):
    """What became of all chunks, ``saved`` of those that were made now and ``reused_bytes`` of those of the parent."""

    forms: tuple[Form, ...] = ()
    saved: tuple[Saved, ...] = ()
    reused_bytes: int = 0


def save_forms(
    chunks: Mapping[int, tuple[Extent, int, Saved]],
    known: dict[_Key, Form],
    encoded: Callable[[Extent, Saved], Task | None],
    saver: Saver,
    pace: Callable[[], None],
) -> Forms:
    """Give every chunk its form: one that is ``known``, else what ``encoded`` offers, saved; chunks without stay without.

    ``chunks`` are those in device memory, by their indices, each with the item size of its segment. Equal ones are encoded
    once. Raises what ``Saver.save`` does.
    """
    keys = {
        index: (saved.raw_hash, item_bytes, extent.length_bytes)
        for index, (extent, item_bytes, saved) in chunks.items()
    }
    made: list[_Key] = []

    def tasks() -> Iterator[Task]:
        tried: set[_Key] = set(known)
        for index, (extent, _, saved) in chunks.items():
            key = keys[index]
            if key in tried:
                continue
            tried.add(key)
            pace()
            task = encoded(extent, saved)
            if task is not None:
                made.append(key)
                yield task

    saved = tuple(saver.save(tasks()))
    new = {
        key: Form(0, each.codec, each.parameters, each.blob, each.stored_bytes)
        for key, each in zip(made, saved, strict=True)
    }
    found = {**known, **new}
    forms = tuple(found[key]._replace(chunk=index) for index, key in keys.items() if key in found)
    reused_bytes = sum(form.stored_bytes for form, key in _distinct(forms, keys) if key in known)
    return Forms(forms, saved, reused_bytes)


def _distinct(forms: Sequence[Form], keys: Mapping[int, _Key]) -> list[tuple[Form, _Key]]:
    return list({form.blob: (form, keys[form.chunk]) for form in forms}.values())
