"""``coldstart keys new | show``: the keys that snapshots are signed and verified with."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from coldstart.errors import ConfigError, UsageError

if TYPE_CHECKING:
    import argparse


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser("keys", help="make a pair of keys that snapshots are signed and verified with")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    new = actions.add_parser("new", help="make a pair, and print both keys as settings")
    new.add_argument(
        "--file", metavar="PATH", help="write the signing key there, for this user alone, and do not print it"
    )
    new.set_defaults(run=run, act=_new)
    show = actions.add_parser(
        "show", help="the public key of the signing key that is set, and the keys that are trusted"
    )
    show.set_defaults(run=run, act=_show)


def run(options: argparse.Namespace) -> int:
    """Act."""
    status: int = options.act(options)
    return status


def _new(options: argparse.Namespace) -> int:
    from coldstart.signing import new_keys

    pair = new_keys()
    if options.file:
        path = os.path.abspath(options.file)
        _write(path, pair.signing)
        print(f"COLDSTART_SIGNING_KEY_FILE={path}")
    else:
        print(f"COLDSTART_SIGNING_KEY={pair.signing}")
    print(f"COLDSTART_VERIFY_KEYS={pair.verifying}")
    return 0


def _write(path: str, key: str) -> None:
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}; choose a file that is not there yet") from error
    with os.fdopen(file, "w") as opened:
        opened.write(key + "\n")


def _show(_: argparse.Namespace) -> int:
    from coldstart.config import load
    from coldstart.signing import key_id, seals_of

    keys = seals_of(load()).verifying_keys
    if not keys:
        raise ConfigError("no key is set: coldstart keys new makes a pair")
    for text in keys:
        print(f"{key_id(text)}  {text}")
    return 0
