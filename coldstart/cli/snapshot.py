"""``coldstart snapshot list | show | verify | delete | rollback | gc``: what is in the store."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

from coldstart.cli import generations
from coldstart.errors import ConfigError, ManifestError, ObjectMissingError, SnapshotError, UsageError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from coldstart.manifest import Manifest, Ref
    from coldstart.repository import Repository
    from coldstart.stores.base import Store
    from coldstart.verify import Place


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser("snapshot", help="list, show, verify, delete, roll back or collect snapshots")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, text, action in (
        ("list", "every snapshot with its current generation", _list),
        ("show", "one snapshot: its buffers, files, chunks, key", _show),
        ("verify", "look whether a snapshot is whole, in the store and in each of its replicas", _verify),
        ("delete", "delete a snapshot; its blobs are left to the collector", _delete),
    ):
        one = actions.add_parser(name, help=text)
        if name != "list":
            one.add_argument("name", metavar="NAME", help="the snapshot's name")
            one.add_argument("--key", help="only this key (or its first digits); default: the newest, for delete all")
        if name == "verify":
            one.add_argument(
                "--level",
                choices=("structure", "sample", "full"),
                default="full",
                help="is everything there; that, and some chunks read, hashed and decoded; or all of them (default)",
            )
            one.add_argument("--repair", action="store_true", help="mend what is wrong from a store that has it right")
        if name == "delete":
            one.add_argument("--yes", action="store_true", help="do not ask")
        one.set_defaults(act=action)
        _add_common(one)
    _add_common(generations.add_gc(actions))
    rollback = generations.add_rollback(actions)
    rollback.set_defaults(act=lambda options, found: generations.roll_back(options, found, _chosen(options, found)))
    _add_common(rollback)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--store", metavar="URL", help="the store (default: COLDSTART_STORE)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Open the store and act."""
    from coldstart.config import load
    from coldstart.early import Opener

    settings = load(store=options.store)
    if not settings.has_store:
        raise ConfigError("COLDSTART_STORE=off: there is no store to look into; name one with --store URL")
    status: int = options.act(options, Opener(settings)())
    return status


def _list(options: argparse.Namespace, repository: Repository) -> int:
    rows = []
    for key, ref in repository.refs():
        if isinstance(ref, ManifestError):
            rows.append({"ref": key, "error": str(ref)})
            continue
        row: dict[str, Any] = {"name": ref.name, "key": ref.key.digest, "generation": ref.generation}
        row["updated"] = _time(ref.updated_seconds)
        try:
            manifest = repository.manifest(ref.manifest, name=ref.name)
            row |= {"rung": manifest.rung, "device": manifest.device_type}
            row |= {"raw_bytes": manifest.raw_bytes, "stored_bytes": manifest.stored_bytes}
        except (SnapshotError, ObjectMissingError) as error:
            row["error"] = str(error)
        rows.append(row)
    if options.json:
        print(json.dumps(rows))
        return 0
    if not rows:
        print(f"no snapshots in {repository.store.url}")
    for row in rows:
        print("  ".join(f"{name}={value}" for name, value in row.items()))
    return 0


def _chosen(options: argparse.Namespace, repository: Repository) -> Ref:
    """The ref that was asked for. Raises UsageError for none, or for a key that several begin with; ManifestError."""
    refs = [ref for _, ref in repository.refs(options.name)]
    found = [ref for ref in refs if not isinstance(ref, ManifestError)]
    if options.key:
        found = [ref for ref in found if ref.key.digest.startswith(options.key)]
    if not found:
        broken = [ref for ref in refs if isinstance(ref, ManifestError)]
        raise broken[0] if broken else _no_snapshot(options, repository)
    if options.key and len(found) > 1:
        raise UsageError(f"{len(found)} keys of {options.name!r} begin with {options.key!r}: give more of its digits")
    return max(found, key=lambda ref: ref.updated_seconds)


def _no_snapshot(options: argparse.Namespace, repository: Repository) -> UsageError:
    which = f"{options.name!r} with key {options.key!r}" if options.key else f"{options.name!r}"
    return UsageError(f"no snapshot {which} in {repository.store.url}; see coldstart snapshot list")


def _show(options: argparse.Namespace, repository: Repository) -> int:
    ref = _chosen(options, repository)
    manifest = repository.manifest(ref.manifest, name=ref.name)
    document = _described(manifest, ref)
    if options.json:
        document["leaves"] = [leaf._asdict() for leaf in manifest.leaves]
        document["files"] = [entry._asdict() for entry in manifest.files]
        document["chunks"] = [chunk._asdict() for chunk in manifest.chunks]
        document["forms"] = [form._asdict() for form in manifest.forms]
        print(json.dumps(document))
        return 0
    for name, value in document.items():
        print(f"{name:14} {value}")
    for leaf in manifest.leaves:
        print(f"  {leaf.path}  {leaf.dtype}{list(leaf.shape)}{'  = ' + leaf.same_as if leaf.same_as else ''}")
    for entry in manifest.files:
        print(f"  {entry.root}/{entry.name}  {entry.length_bytes} bytes")
    return 0


def _described(manifest: Manifest, ref: Ref) -> dict[str, Any]:
    codecs: dict[str, int] = {}
    for chunk in manifest.chunks:
        codecs[chunk.codec] = codecs.get(chunk.codec, 0) + 1
    form_bytes = sum(manifest.blobs.values()) - manifest.stored_bytes
    return {
        "name": manifest.name,
        "generation": manifest.generation,
        "previous": ref.previous_generation or None,
        "kept": ", ".join(str(entry.generation) for entry in ref.named),
        "created": _time(manifest.created_seconds),
        "signed": "yes, verified" if manifest.signature else "no, or not verified",
        "rung": manifest.rung,
        "device": manifest.device_type,
        "key": manifest.key.digest,
        "depends on": ", ".join(sorted(manifest.key.parts)),
        "raw bytes": manifest.raw_bytes,
        "stored bytes": manifest.stored_bytes,
        "buffers": len(manifest.buffers),
        "chunks": ", ".join(f"{count} {codec}" for codec, count in sorted(codecs.items())),
        "for GPUs": f"{len(manifest.forms)} chunks in another form too, {form_bytes} bytes" if manifest.forms else None,
        "made with": ", ".join(f"{name} {version}" for name, version in sorted(manifest.provenance.items())),
    }


def _verify(options: argparse.Namespace, repository: Repository) -> int:
    from coldstart.verify import NO_CHUNK, repair, verify_stores

    ref = _chosen(options, repository)
    manifest = repository.manifest(ref.manifest, name=ref.name)
    stores = repository.store.stores
    places = list(verify_stores(manifest, ref.manifest, repository.store, level=options.level))
    found = len(places)
    if options.repair and places:
        places = list(repair(manifest, repository.store, places))
    if not places:
        _lift_quarantine(options, repository, ref)
    if options.json:
        findings = [{"store": stores[place.store].url, **place.finding._asdict()} for place in places]
        document = {"name": ref.name, "generation": ref.generation, "level": options.level, "findings": findings}
        print(json.dumps({**document, "repaired": found - len(places)}))
        return 1 if places else 0
    for place in places:
        where = f"{stores[place.store].url}: " if len(stores) > 1 else ""
        chunk, blob, problem = place.finding
        print(f"{where}{problem}" if chunk == NO_CHUNK else f"{where}chunk {chunk} ({blob[:12]}): {problem}")
    if found > len(places):
        print(f"mended {found - len(places)} of {found}")
    _summarise(ref, manifest, [place for place in places if place.finding.chunk != NO_CHUNK], stores)
    return 1 if places else 0


def _summarise(ref: Ref, manifest: Manifest, wrong: Sequence[Place], stores: Sequence[Store]) -> None:
    for number, store in enumerate(stores):
        bad = {place.finding.chunk for place in wrong if place.store == number}
        good = len(manifest.chunks) - len(bad)
        where = f" in {store.url}" if len(stores) > 1 else ""
        print(f"{ref.name} generation {ref.generation}{where}: {good} of {len(manifest.chunks)} chunks are right")


def _lift_quarantine(options: argparse.Namespace, repository: Repository, ref: Ref) -> None:
    """What has just been found good is tried first again on this host; lengths alone are too little to say so."""
    from coldstart.config import load
    from coldstart.quarantine import Quarantine

    if options.level != "structure":
        Quarantine(load(store=options.store).files_folder, repository.store.url).lift(ref.manifest)


def _delete(options: argparse.Namespace, repository: Repository) -> int:
    digest = _chosen(options, repository).key.digest if options.key else None
    if not any(True for _ in repository.refs(options.name)):
        raise _no_snapshot(options, repository)
    if not options.yes:
        _confirm(f"{f'key {digest} of ' if digest else ''}snapshot {options.name!r} in {repository.store.url}")
    deleted = repository.delete(options.name, digest)
    print(json.dumps(deleted) if options.json else f"deleted {len(deleted)} objects of {options.name!r}")
    return 0


def _confirm(what: str) -> None:
    """Ask a person. Raises UsageError for any answer but yes, and where nobody is there to answer."""
    print(f"delete {what}? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UsageError(f"nothing was deleted: answer y, or add --yes, to delete {what}")


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
