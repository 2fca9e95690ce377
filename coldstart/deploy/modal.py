"""Deploying a handler's file to Modal: a small generated file, and ``modal deploy`` of it.

The generated file holds a plan, a literal, and a line that makes the app from it (``coldstart.adapters.modal.deployed``).
Here and in the container the same plan makes the same app. Secret values are never in it, only their variables' names.
A file that makes its own app with ``service(app, handler)`` is deployed as it is, after its classes were checked.
"""

from __future__ import annotations

import ast
import json
import keyword
import os
import pprint
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING, Any

from coldstart import config
from coldstart.config import child_environment, environment_now
from coldstart.deploy.image import DEFAULT_PYTHON, NVCOMP, own_requirements
from coldstart.deploy.options import add_common_arguments, overridden
from coldstart.deploy.shape import read_shape
from coldstart.deploy.sources import source_files
from coldstart.deploy.variables import NO_DEPENDENCIES, check_access, check_not_written, notes, store_variables
from coldstart.errors import ConfigError, DeployError, HandlerError, UsageError
from coldstart.script import read_script
from coldstart.terms import MODAL_SNAPSHOTS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Mapping

    from coldstart.deploy.shape import HandlerShape
    from coldstart.loading import Target
    from coldstart.script import Script

REMOTE_FOLDER = "/root/coldstart_app"
"""Where the handler's files are in the container."""

VOLUME_FOLDER = "/coldstart-volume"
"""Where a Modal volume is mounted; restored files are kept in it."""

_REMEDY = "or name Modal secrets that hold them in [tool.coldstart.modal], secrets = [...]"
_GENERATED = '''"""Made by `coldstart deploy modal`: change the handler's file or the command's options, not this file."""

from coldstart.adapters.modal import deployed

PLAN = {plan}

app, {name} = deployed(__name__, PLAN)
'''

_OF_GENERATED_APPS = ("write", "snapshot", "web", "gpu", "concurrency", "min_workers", "max_workers", "idle_seconds")
"""Options that say what a generated app is like: a file that makes its own app says that itself."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes besides the target. Each option that the block has too overrides the block."""
    add_common_arguments(parser, "app")
    parser.add_argument("--snapshot", choices=MODAL_SNAPSHOTS, help="Modal's own memory snapshots")
    parser.add_argument("--web", choices=("GET", "POST"), help="also answer HTTP requests of this method")
    parser.add_argument("--environment", metavar="NAME", help="the Modal environment to deploy to")
    parser.add_argument("--write", metavar="FILE", help="write the generated app to FILE and deploy nothing")


def deploy_command(options: argparse.Namespace, target: Target) -> int:
    """Deploy, show or delete; returns the exit status."""
    if _makes_an_app(target.path):
        return _deploy_own_file(options, target)
    script, shape = overridden(read_script(target.path), options), read_shape(target.path, target.name)
    if options.delete:
        return _stop(options.name or shape.name, options)
    plan = make_plan(target.path, shape, script, options, environment_now())
    unsaid = () if script.dependencies else (NO_DEPENDENCIES,)
    for note in (*notes(plan["variables"]), *unsaid):
        print(f"note: {note}", file=sys.stderr)
    text = app_file(plan)
    if options.write:
        with open(options.write, "w", encoding="utf-8") as file:
            file.write(text)
        print(f"written: {options.write}; deploy it with: modal deploy {options.write}")
        return 0
    if options.dry_run:
        print(text)
    with tempfile.TemporaryDirectory(prefix="coldstart-modal-") as folder:
        path = os.path.join(folder, f"coldstart_{plan['class'].lower()}.py")
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        return _modal(["deploy", path, *_environment_words(options)], dry_run=options.dry_run)


def app_file(plan: Mapping[str, Any]) -> str:
    """The generated file of a plan."""
    return _GENERATED.format(plan=pprint.pformat(dict(plan), width=118, sort_dicts=False), name=plan["class"])


def class_name(name: str) -> str:
    """The class of a handler: ``all-minilm.v2`` is ``AllMinilmV2``."""
    words = name.replace("-", " ").replace("_", " ").replace(".", " ").split()
    joined = "".join(word[:1].upper() + word[1:] for word in words)
    return joined if joined[:1].isalpha() and not keyword.iskeyword(joined) else f"Handler{joined}"


# --- the plan --------------------------------------------------------------------------------------------------------


def make_plan(
    path: str, shape: HandlerShape, script: Script, options: argparse.Namespace, environment: Mapping[str, str]
) -> dict[str, Any]:
    """All that the container needs to make the same app again: plain values, and no secret among them.

    Raises ConfigError listing the declared secrets that are missing, and for a store that containers would not share.
    """
    check_not_written(shape, script, _REMEDY)
    variables, secret_names = store_variables({**environment, **script.env})
    _check_store(variables)
    address = variables.get("COLDSTART_STORE", "")
    if address != config.OFF and not script.modal.secrets:  # those may hold the credentials, and cannot be looked at
        check_access(address, variables, _REMEDY)
    web = options.web or script.modal.web
    plan = {
        "app": options.name or shape.name,
        "class": class_name(shape.name),
        "handler": {
            "file": os.path.basename(path),
            "name": shape.name,
            "kind": shape.kind,
            "methods": dict(shape.methods),
        },
        "concurrency": script.concurrency or shape.concurrency,
        "modal_snapshot": options.snapshot or script.modal.snapshot,
        "web": web,
        "python": script.python or DEFAULT_PYTHON,
        "apt": list(script.apt),
        "pip": _packages(script, web),
        "env": {
            **{name: environment[name] for name in shape.env if name in environment},
            **{name: text for name, text in variables.items() if name not in secret_names},
            **({"COLDSTART_CONCURRENCY": str(script.concurrency)} if script.concurrency else {}),
            **({"COLDSTART_FILES_FOLDER": f"{VOLUME_FOLDER}/files"} if script.modal.volume else {}),
            **script.env,
        },
        "files": [[local, name] for local, name in source_files(path, script)],
        "remote_folder": REMOTE_FOLDER,
        "secrets": list(script.modal.secrets),
        "variables": _secrets_from_here(shape, script, secret_names, environment),
        "volume": script.modal.volume,
        "volume_folder": VOLUME_FOLDER,
        "options": _class_options(script),
    }
    plain: dict[str, Any] = json.loads(json.dumps(plan))  # tuples would come back as lists from the file
    return plain


def _packages(script: Script, web: str) -> list[str]:
    of_web = ("fastapi>=0.110",) if web else ()
    extras = ("s3", NVCOMP) if script.modal.gpu or script.gpu else ("s3",)
    return list(dict.fromkeys((*script.dependencies, *of_web, *own_requirements(extras))))


def _class_options(script: Script) -> dict[str, Any]:
    gpus = script.modal.gpu or script.gpu
    counted = [f"{gpu}:{script.gpu_count}" if script.gpu_count > 1 and ":" not in gpu else gpu for gpu in gpus]
    given = {
        "gpu": (counted[0] if len(counted) == 1 else counted) if counted else None,
        "timeout": script.timeout_seconds,
        "scaledown_window": script.idle_seconds,
        "min_containers": script.min_workers,
        "max_containers": script.max_workers,
        "region": script.modal.region or None,
    }
    return {name: value for name, value in given.items() if value is not None}


def _secrets_from_here(
    shape: HandlerShape, script: Script, store_secrets: set[str], environment: Mapping[str, str]
) -> list[str]:
    """The variables that go from here into a secret of the app's own; others are expected in the Modal secrets named."""
    missing = [name for name in shape.secrets if not environment.get(name)]
    if missing and not script.modal.secrets:
        raise ConfigError(
            f"handler {shape.name!r} needs the secrets {', '.join(missing)}: set them where you deploy, {_REMEDY}"
        )
    found = config.given(environment)  # a credential may be there under its AWS name
    of_store = sorted(
        found[setting.field].source.variable
        for setting in config.SETTINGS
        if setting.variable in store_secrets and setting.field in found
    )
    return [name for name in dict.fromkeys((*shape.secrets, *of_store)) if environment.get(name)]


def _check_store(variables: Mapping[str, str]) -> None:
    address = variables.get("COLDSTART_STORE", "")
    if not address.startswith(("s3://", "r2://")) and address != "off":
        what = f"COLDSTART_STORE={address} is a folder" if address else "COLDSTART_STORE is not set"
        raise ConfigError(
            f"{what}, and containers of Modal share none: set it to r2://bucket/prefix or s3://bucket/prefix, or to off"
        )


# --- files with an app of their own ----------------------------------------------------------------------------------


def _makes_an_app(path: str) -> bool:
    """Whether a file imports Modal and calls its ``App``."""
    with open(path, encoding="utf-8") as file:
        try:
            nodes = list(ast.walk(ast.parse(file.read(), path)))
        except SyntaxError:
            return False  # whoever reads the handler says where
    calls = {ast.unparse(node.func).rpartition(".")[2] for node in nodes if isinstance(node, ast.Call)}
    return "App" in calls and "modal" in {name for node in nodes for name in _imported(node)}


def _imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name.partition(".")[0] for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        yield node.module.partition(".")[0]


def _deploy_own_file(options: argparse.Namespace, target: Target) -> int:
    """Import the file, check what Modal would tell only in the container, and deploy it as it is."""
    from coldstart.adapters.modal import misplaced
    from coldstart.loading import import_file, prepare_path

    given = [name for name in _OF_GENERATED_APPS if getattr(options, name) is not None]
    if given:
        option = f"--{given[0].replace('_', '-')}"
        raise UsageError(f"{option}: {target.path} makes its own app: say it there, in service(app, handler, ...)")
    if options.delete:
        if not options.name:
            raise UsageError("which app is it? give --name NAME")
        return _stop(options.name, options)
    prepare_path(target.path)
    found = misplaced(import_file(target.path))
    if found:
        raise HandlerError("; ".join(found))
    name = ["--name", options.name] if options.name else []
    return _modal(["deploy", target.path, *name, *_environment_words(options)], dry_run=options.dry_run)


# --- modal -----------------------------------------------------------------------------------------------------------


def _stop(app: str, options: argparse.Namespace) -> int:
    return _modal(["app", "stop", "--yes", app, *_environment_words(options)], dry_run=options.dry_run)


def _environment_words(options: argparse.Namespace) -> list[str]:
    return ["--env", options.environment] if options.environment else []


def _modal(words: list[str], *, dry_run: bool) -> int:
    """Run Modal's command line, whose output is for whoever deploys. Raises DeployError where it fails or is missing."""
    if dry_run:
        print(f"# would run: modal {' '.join(words)}")
        return 0
    from importlib.util import find_spec

    if find_spec("modal") is None:
        raise DeployError('the package of Modal is not installed: pip install "coldstart-gpu[modal]"')
    # The generated file imports this very coldstart, wherever it runs from.
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    path = os.pathsep.join(filter(None, (root, environment_now().get("PYTHONPATH", ""))))
    status = subprocess.run(  # noqa: PLW1510  the status is the answer
        [sys.executable, "-m", "modal", *words], env=child_environment({"PYTHONPATH": path})
    ).returncode
    if status:
        raise DeployError(f"modal {words[0]} failed with status {status}: its messages above say why")
    return 0
