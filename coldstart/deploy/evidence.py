"""What a store says of a pod's worker: which snapshot it depends on, and whether that is there, current and whole.

The pod cannot be asked, so the store is: its worker has written a start record since the pod started, with the keys of
its snapshots; those keys have refs; their manifests' every byte is read, hashed and decoded. Where any of this is in
doubt, ``find_proven`` raises, and says what to do.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.errors import DeployError, ManifestError, ObjectMissingError, SnapshotError
from coldstart.manifest import check_name
from coldstart.verify import verify

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from coldstart.manifest import Ref
    from coldstart.repository import Repository

CLOCKS_SECONDS = 60.0
"""How far the clocks of the platform, the pod and the store may differ."""

_MOST_RECORDS = 1000
_MOST_CHANGES = 3


class Proven(NamedTuple):
    """Generations that were verified in full: name, number and manifest of each, and their stored bytes."""

    generations: tuple[tuple[str, int, str], ...]
    stored_bytes: int


class _NotYet(Exception):  # noqa: N818  a signal between the functions here; at last it is a DeployError
    """What is looked for is not in the store, and may yet come."""


def find_proven(
    repository: Repository,
    name: str,
    *,
    worker: str,
    since_seconds: float,
    key: str = "",
    wait_seconds: float,
    poll_seconds: float,
    say: Callable[[str], None],
) -> Proven:
    """The current generations that the worker of ``name``, started since then (Unix time), depends on, verified in full.

    ``worker``: what the platform calls it; records that name another worker do not count, those that name none do.
    ``key``: the first digits of the one that is meant, where workers of several keys have started. Waits for what may
    yet come. Raises DeployError, SnapshotError and StoreError for any doubt.
    """

    def look() -> list[Ref]:
        return _refs_of_worker(repository, name, worker, since_seconds, key)

    refs = _await_refs(look, wait_seconds, poll_seconds, say)
    for _ in range(_MOST_CHANGES):
        stored_bytes = sum(_verified_bytes(repository, ref) for ref in refs)
        again = _await_refs(look, 0.0, poll_seconds, say)
        if [ref.manifest for ref in again] == [ref.manifest for ref in refs]:
            found = tuple((ref.name, ref.generation, ref.manifest) for ref in refs)
            return Proven(found, stored_bytes)
        refs = again  # a newer generation came while the old one was read
    raise DeployError(f"snapshot {name!r} is replaced again and again while it is verified: try again when it rests")


def _await_refs(
    look: Callable[[], list[Ref]], wait_seconds: float, poll_seconds: float, say: Callable[[str], None]
) -> list[Ref]:
    """What ``look`` finds, as soon as it does. Raises DeployError when the time is over, with what was missing last."""
    deadline_seconds = time.monotonic() + wait_seconds
    told = ""
    while True:
        try:
            return look()
        except _NotYet as error:
            if time.monotonic() >= deadline_seconds:
                raise DeployError(str(error)) from error
            if str(error) != told:
                told = str(error)
                say(f"waiting: {told}")
            time.sleep(min(poll_seconds, max(0.0, deadline_seconds - time.monotonic())))


def _verified_bytes(repository: Repository, ref: Ref) -> int:
    """Read a generation in full; its stored bytes. Raises SnapshotError for anything that is not as it should be."""
    try:
        manifest = repository.manifest(ref.manifest, name=ref.name)
    except ObjectMissingError as error:
        raise SnapshotError(f"the manifest of {ref.name!r} generation {ref.generation} is gone") from error
    for finding in verify(manifest, repository.store):
        raise SnapshotError(
            f"snapshot {ref.name!r} generation {ref.generation} is damaged (chunk {finding.chunk}: {finding.problem});"
            f" see coldstart snapshot verify {ref.name}. Delete it with coldstart snapshot delete {ref.name}, restart the"
            " pod's worker, and it makes another",
            snapshot=ref.name,
        )
    return manifest.stored_bytes


# --- which snapshot ---------------------------------------------------------------------------------------------------


def _refs_of_worker(repository: Repository, name: str, worker: str, since_seconds: float, key: str) -> list[Ref]:
    """The refs of all parts of the worker's state, in the order of their names. Raises _NotYet, DeployError and ManifestError."""
    records = [each for each in _records(repository, name, since_seconds) if is_of(each, worker)]
    if not records:
        raise _NotYet(
            f"no worker of {name!r} has written a start record into {repository.store.url} since the pod started: wait"
            " until it is ready; is this its handler and its store, and are COLDSTART_START_RECORDS on?"
        )
    digests = _one_key(records, name, key)
    mine = [record for record in records if record["key"] == digests]
    there = dict(_refs(repository, name))
    refs = []
    for digest in digests.split():
        if digest not in there:
            raise _NotYet(
                f"snapshot {name!r} has no generation for key {digest} yet: its worker makes one after its warm-up, and its"
                " log says why if it cannot"
            )
        refs.append(_checked(there[digest], mine))
    return sorted(refs, key=lambda ref: ref.name)


def _one_key(records: list[dict[str, Any]], name: str, key: str) -> str:
    """The keys of the worker's snapshots, as its record has them. Raises DeployError where there is no one answer."""
    found = sorted({str(record["key"]) for record in records})
    if key:
        found = [each for each in found if any(digest.startswith(key) for digest in each.split())]
        if not found:
            raise _NotYet(f"no worker of {name!r} with key {key!r} has started since the pod did")
    if len(found) > 1:
        raise DeployError(
            f"workers of {name!r} with different keys have started since the pod did ({', '.join(found)}), and nothing says"
            " which is the pod's: give --key with its first digits, as its log has them"
        )
    if not found[0]:
        raise DeployError(
            f"the worker of {name!r} makes no snapshot, so nothing would be left of it: see its log for why"
        )
    return found[0]


def _checked(ref: Ref | ManifestError, records: list[dict[str, Any]]) -> Ref:
    """The ref, if it is what the worker started from or has made since. Raises ManifestError, _NotYet."""
    if isinstance(ref, ManifestError):
        raise ref
    restored = [record for record in records if record.get("own_kind", record.get("kind")) == "restored"]
    began_seconds = min(float(record["process_start_unix_seconds"]) for record in records)
    if not restored and ref.updated_seconds < began_seconds - CLOCKS_SECONDS:
        raise _NotYet(
            f"the generation {ref.generation} of {ref.name!r} is older than the worker, which could not start from it, and"
            " has not made another yet; its log says why if it cannot"
        )
    return ref


def _refs(repository: Repository, name: str) -> Iterator[tuple[str, Ref | ManifestError]]:
    """Key digest -> ref, of the snapshot of a handler and of those of its state's parts."""
    parts = {info.key.split("/")[1] for info in repository.store.list(f"refs/{check_name(name)}=")}
    for snapshot in (name, *sorted(parts)):
        for key, ref in repository.refs(snapshot):
            yield key.split("/")[2], ref


def record_keys(repository: Repository, name: str) -> dict[str, float]:
    """The keys of a name's start records, and when each was written, by the store's clock."""
    return {info.key: info.modified_seconds for info in repository.store.list(f"starts/{check_name(name)}/")}


def read_start(repository: Repository, key: str) -> dict[str, Any] | None:
    """A start record; None for one that cannot be read: it says nothing."""
    try:
        record = json.loads(repository.store.get(key).data)
    except (ObjectMissingError, ValueError):
        return None
    good = isinstance(record, dict) and isinstance(record.get("key"), str)
    return record if good and isinstance(record.get("process_start_unix_seconds"), (int, float)) else None


def is_of(record: dict[str, Any], worker: str) -> bool:
    """Whether a start record may be the worker's: it names it, or none."""
    return record.get("worker", "") in ("", worker)


def _records(repository: Repository, name: str, since_seconds: float) -> Iterator[dict[str, Any]]:
    """The start records of processes that began since then, newest first."""
    least_seconds = since_seconds - CLOCKS_SECONDS
    written = record_keys(repository, name)
    recent = [key for key, seconds in written.items() if seconds >= least_seconds]
    for key in sorted(recent, key=written.__getitem__, reverse=True)[:_MOST_RECORDS]:
        record = read_start(repository, key)
        if record is not None and record["process_start_unix_seconds"] >= least_seconds:
            yield record
