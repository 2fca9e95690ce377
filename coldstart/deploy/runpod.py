"""``coldstart deploy runpod``: from a handler's file to a RunPod Serverless endpoint."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from typing import TYPE_CHECKING

from coldstart.config import environment_now
from coldstart.deploy.apply import apply_plan, delete
from coldstart.deploy.image import Image, build_and_push
from coldstart.deploy.options import add_common_arguments, overridden
from coldstart.deploy.plan import make_plan
from coldstart.deploy.rest import Recorder, runpod_client
from coldstart.deploy.shape import read_shape
from coldstart.deploy.sources import source_files
from coldstart.deploy.variables import NO_DEPENDENCIES
from coldstart.errors import UsageError
from coldstart.script import read_script

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

    from coldstart.deploy.apply import Step
    from coldstart.deploy.plan import Plan
    from coldstart.deploy.rest import Client
    from coldstart.loading import Target
    from coldstart.script import Script


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes besides the target. Each option that the block has too overrides the block."""
    images = parser.add_mutually_exclusive_group()
    images.add_argument(
        "--registry", metavar="REPO", help="build the image and push it here, such as ghcr.io/me/minilm"
    )
    images.add_argument("--image", metavar="REF", help="deploy this image, which is there already")
    add_common_arguments(parser, "endpoint")
    parser.add_argument("--allow-local-store", action="store_true", help="let each worker keep snapshots of its own")


def deploy_command(options: argparse.Namespace, target: Target) -> int:
    """Deploy or delete, and say what was done. Raises ColdstartError."""
    shape = read_shape(target.path, target.name)
    if options.delete:
        client = _client(options)
        _report(client, delete(client, options.name or shape.name))
        return 0
    script = overridden(read_script(target.path), options)
    plan_for = partial(
        make_plan,
        shape,
        script,
        environment=environment_now(),
        name=options.name,
        allow_local_store=options.allow_local_store,
    )
    plan_for("")  # what is wrong is told before an image is built
    plan = plan_for(_image(options, target, script))
    unsaid = () if script.dependencies or options.image else (NO_DEPENDENCIES,)
    for note in (*plan.notes, *unsaid):
        print(f"note: {note}", file=sys.stderr)
    client = _client(options, plan)
    steps = apply_plan(client, plan)
    _report(client, steps, plan)
    if not options.dry_run:
        print(f"send events to https://api.runpod.ai/v2/{steps[-1].id}/runsync")
    return 0


def _image(options: argparse.Namespace, target: Target, script: Script) -> str:
    """The reference of the image: the given one, or of the one that is built now."""
    if options.image:
        return str(options.image)
    if not options.registry:
        raise UsageError("say where the image goes: --registry ghcr.io/me/minilm; or which one to use: --image REF")
    image = Image(script, source_files(target.path, script), os.path.basename(target.path))
    return build_and_push(image, options.registry, dry_run=options.dry_run)


def _client(options: argparse.Namespace, plan: Plan | None = None) -> Client:
    client = runpod_client(dry_run=options.dry_run, hidden=plan.hidden if plan else ())
    if isinstance(client, Recorder) and not client.knows:
        print("note: RUNPOD_API_KEY is not set: the account is taken to be empty", file=sys.stderr)
    return client


def _report(client: Client, steps: Iterable[Step], plan: Plan | None = None) -> None:
    """Print what was done; of a dry run, the requests that would have been sent."""
    if not isinstance(client, Recorder):
        print("\n".join(map(str, steps)))
        return
    for request in client.requests:
        print(f"{request.method} {request.url}")
        if request.body is not None:
            print(json.dumps(plan.shown(request.body) if plan else request.body, indent=2, sort_keys=True))
