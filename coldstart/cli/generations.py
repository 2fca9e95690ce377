"""``coldstart snapshot rollback | gc``: which generation is current, and what is deleted for good."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from coldstart.errors import UsageError

if TYPE_CHECKING:
    import argparse

    from coldstart.collect import Collected
    from coldstart.manifest import Ref
    from coldstart.repository import Repository

_HOUR_SECONDS = 3600.0


def add_rollback(actions: Any) -> argparse.ArgumentParser:
    """Register ``rollback``."""
    parser: argparse.ArgumentParser = actions.add_parser("rollback", help="make an earlier generation current again")
    parser.add_argument("name", metavar="NAME", help="the snapshot's name")
    parser.add_argument("--key", help="only this key (or its first digits); default: the newest")
    parser.add_argument("--generation", type=int, metavar="N", help="this one; default: the one before the current")
    return parser


def add_gc(actions: Any) -> argparse.ArgumentParser:
    """Register ``gc``."""
    parser: argparse.ArgumentParser = actions.add_parser("gc", help="delete what no snapshot needs any more")
    parser.add_argument("--dry-run", action="store_true", help="say what would go, and change nothing")
    parser.add_argument("--keep-last", type=int, default=3, metavar="N", help="generations of each key (default: 3)")
    parser.add_argument("--keep-days", type=float, default=0.0, metavar="N", help="and those of the last N days")
    parser.add_argument("--keep-daily", type=int, default=0, metavar="N", help="and the last one of each of N days")
    parser.add_argument(
        "--keep-starts-days", type=float, default=30.0, metavar="N", help="start records (default: 30; 0: for ever)"
    )
    parser.add_argument(
        "--grace-hours", type=float, default=24.0, metavar="H", help="spare what is younger (default and least: 24)"
    )
    parser.set_defaults(act=collect_once)
    return parser


def roll_back(options: argparse.Namespace, repository: Repository, chosen: Ref) -> int:
    """Make an earlier generation of ``chosen`` current."""
    from coldstart import rollback

    ref = rollback.roll_back(repository, chosen.name, chosen.key, options.generation)
    source = repository.manifest(ref.manifest, name=ref.name).provenance[rollback.ORIGIN]
    if options.json:
        print(json.dumps({"name": ref.name, "generation": ref.generation, "copy_of": int(source)}))
    else:
        print(f"{ref.name} generation {ref.generation} is current: a copy of generation {source}")
    return 0


def collect_once(options: argparse.Namespace, repository: Repository) -> int:
    """Collect in a store. Raises UsageError for rules that cannot be meant."""
    from coldstart.collect import Rules, collect
    from coldstart.repository import COLLECTION_GRACE_SECONDS
    from coldstart.retention import Retention

    grace_seconds = options.grace_hours * _HOUR_SECONDS
    if grace_seconds < COLLECTION_GRACE_SECONDS:
        raise UsageError("--grace-hours has to be 24 at least: captures rely on that much")
    if options.keep_last < 1 or min(options.keep_days, options.keep_daily, options.keep_starts_days) < 0:
        raise UsageError("--keep-last has to be 1 at least, the other rules 0: the current generation always stays")
    repository.margins = repository.margins._replace(grace_seconds=grace_seconds)
    retention = Retention(options.keep_last, options.keep_days, options.keep_daily)
    collected = collect(repository, Rules(retention, options.keep_starts_days, options.dry_run))
    if options.json:
        print(json.dumps({**collected._asdict(), "dry_run": options.dry_run}))
    else:
        _say(collected, is_dry=options.dry_run)
    return 0


def _say(collected: Collected, *, is_dry: bool) -> None:
    for manifest in collected.forgotten:
        print(f"{'would no longer keep' if is_dry else 'no longer kept'}: {manifest}")
    print(
        f"{'would delete' if is_dry else 'deleted'} {collected.blobs} blobs ({collected.blob_bytes / 1e6:.1f} MB),"
        f" {collected.manifests} manifests, {collected.starts} start records, {collected.flat_files} flat files;"
        f" {collected.live_blobs} blobs are live"
    )
    if collected.left:
        print(f"{collected.left} objects could not be deleted now: the next gc tries again")
