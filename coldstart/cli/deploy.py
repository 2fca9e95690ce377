"""``coldstart deploy runpod|modal FILE[:NAME]``: the same file, on a platform."""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any

PLATFORMS = {"runpod": "RunPod Serverless", "modal": "Modal"}
"""Platform -> what it is. ``coldstart.deploy.<platform>`` has ``add_arguments`` and ``deploy_command``."""


def add_parser(subparsers: Any) -> None:
    """Register the command. Its words are parsed in ``run``, where the platform is known: only that one is imported."""
    no_options = {"add_help": False, "prefix_chars": "\0"}  # every word, --help too, is for ``run``
    parser = subparsers.add_parser("deploy", help="put a handler's file on a platform", **no_options)
    parser.add_argument("words", nargs=argparse.REMAINDER)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Parse the platform's options and deploy."""
    from coldstart.loading import parse_target

    words = options.words
    parser = argparse.ArgumentParser(prog="coldstart deploy", description="Put a handler's file on a platform.")
    platforms = parser.add_subparsers(dest="platform", metavar="PLATFORM", required=True)
    for name, text in PLATFORMS.items():
        platform = platforms.add_parser(name, help=text, description=f"Put a handler's file on {text}.")
        if words and words[0] == name:
            platform.add_argument(
                "target", metavar="FILE[:NAME]", help="the handler's file, and its name if it has several"
            )
            import_module(f"coldstart.deploy.{name}").add_arguments(platform)
    chosen = parser.parse_args(words)
    module = import_module(f"coldstart.deploy.{chosen.platform}")
    status: int = module.deploy_command(chosen, parse_target(chosen.target))
    return status
