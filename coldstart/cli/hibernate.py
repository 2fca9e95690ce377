"""``coldstart hibernate POD``: end a pod once its snapshot is in the store, current and verified; never before."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    from coldstart.config import Settings
    from coldstart.repository import Repository

WAIT_SECONDS = 300.0


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser("hibernate", help="end a pod once its snapshot is in the store and verified")
    parser.add_argument("pod", metavar="POD", help="the pod's id")
    parser.add_argument("--name", default="", help="the handler's name (default: the pod's COLDSTART_HANDLER)")
    parser.add_argument(
        "--key", default="", help="the first digits of the snapshot's key, where several could be meant"
    )
    parser.add_argument("--store", metavar="URL", help="the pod's store (default: COLDSTART_STORE)")
    parser.add_argument(
        "--wait", type=seconds, default=WAIT_SECONDS, metavar="SECONDS", help="how long to wait for a snapshot"
    )
    parser.add_argument(
        "--keep", action="store_true", help="stop the pod instead of terminating it; its disk is billed"
    )
    parser.add_argument("--discard-disk", action="store_true", help="terminate although a persistent disk goes with it")
    parser.add_argument("--dry-run", action="store_true", help="verify, print what would be sent, and send nothing")
    parser.set_defaults(run=run)


def seconds(text: str) -> float:
    """A number of seconds on the command line."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError(text)
    return value


def open_repository(store: str | None) -> tuple[Repository, Settings]:
    """The snapshots that a command looks at, and the settings. Raises ConfigError where there is no store."""
    from coldstart.config import load
    from coldstart.early import Opener
    from coldstart.errors import ConfigError

    settings = load(store=store)
    if not settings.has_store:
        raise ConfigError("COLDSTART_STORE=off: there is no store to look into; name one with --store URL")
    return Opener(settings)(), settings


def say(text: str) -> None:
    """What goes on, to standard error."""
    print(text, file=sys.stderr, flush=True)


def run(options: argparse.Namespace) -> int:
    """Hibernate, and print what the pod will wake from."""
    from coldstart.deploy.hibernation import Hibernator
    from coldstart.deploy.rest import Recorder, runpod_client

    repository, settings = open_repository(options.store)
    client = runpod_client(dry_run=options.dry_run)
    done = Hibernator(client, repository, settings, say=say, dry_run=options.dry_run).hibernate(
        options.pod,
        name=options.name,
        key=options.key,
        wait_seconds=options.wait,
        keep=options.keep,
        discard_disk=options.discard_disk,
    )
    if isinstance(client, Recorder):
        for request in client.requests:
            print(f"{request.method} {request.url} {json.dumps(request.body)}")
        return 0
    for name, generation, _ in done.proven.generations:
        print(f"{name} generation {generation}: every byte verified")
    ended = "stopped" if options.keep else "terminated"
    print(f"pod {done.pod} {ended}; {done.proven.stored_bytes} bytes to wake from: coldstart wake {done.name}")
    return 0
