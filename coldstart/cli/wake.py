"""``coldstart wake NAME``: a new pod, anywhere, that starts from the snapshot of one that hibernates."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from coldstart.cli.hibernate import open_repository, say, seconds

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

    from coldstart.deploy.hibernation import Waking

WAIT_SECONDS = 900.0
_SHORTEST_SECRET = 8
"""Shorter values are no secrets, and masking them would mangle messages."""


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser("wake", help="a new pod that starts from the snapshot of one that hibernates")
    parser.add_argument("name", metavar="NAME", help="the handler's name")
    parser.add_argument("--gpu", default="", metavar="ID", help="another GPU, such as 'NVIDIA GeForce RTX 4090'")
    parser.add_argument("--template", default="", metavar="ID", help="another template")
    parser.add_argument("--store", metavar="URL", help="where the snapshot is (default: COLDSTART_STORE)")
    parser.add_argument(
        "--wait", type=seconds, default=WAIT_SECONDS, metavar="SECONDS", help="how long pod and worker have to start"
    )
    parser.add_argument("--another", action="store_true", help="although a pod of this name runs already")
    parser.add_argument("--dry-run", action="store_true", help="print what would be sent, and send nothing")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Make the pod, wait for its worker, and print how that started."""
    from coldstart.deploy.hibernation import Waker
    from coldstart.deploy.plan import MARK
    from coldstart.deploy.pods import STORE, body_of, read_record
    from coldstart.deploy.rest import runpod_client
    from coldstart.terms import MASK

    repository, _ = open_repository(options.store)
    url = repository.store.url
    record = read_record(repository.store, options.name)
    body = body_of(record, options.name, store_url=url, template=options.template, gpu=options.gpu)
    hidden = {name: value for name, value in body["env"].items() if name not in (MARK, STORE)}
    long_ones = [value for value in hidden.values() if len(value) >= _SHORTEST_SECRET]
    client = runpod_client(dry_run=options.dry_run, hidden=long_ones)
    waker = Waker(client, repository, say=say)
    if not options.another:
        waker.check_alone(options.name, body)
    if options.dry_run:
        shown = {**body, "env": {**body["env"], **dict.fromkeys(hidden, MASK)}}
        print(f"POST {client.base_url}/v2/pods {json.dumps(shown)}")
        return 0
    _print(options.name, waker.wake(options.name, body, wait_seconds=options.wait))
    return 0


def _print(name: str, woken: Waking) -> None:
    start: Mapping[str, Any] = woken.start
    generation = f" generation {start['generation']}" if start.get("generation") else ""
    ready = start.get("ready_seconds")
    took = f", ready {ready:.2f} s after its process began" if isinstance(ready, (int, float)) else ""
    why = f" ({start['reason']})" if start.get("reason") else ""
    print(f"{name} {start.get('kind')}{generation}{took}{why}")
    print(f"pod {woken.pod} woke {woken.seconds:.1f} s after it was asked for")
