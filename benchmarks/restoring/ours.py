"""The one place where these benchmarks reach into coldstart: a restore, and a fetch by any engine or client.

All settings come from ``COLDSTART_*`` variables, so a reader measures what a worker with that environment would do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart import events
from coldstart.config import environment_now, load
from coldstart.devices import pick
from coldstart.early import Opener, Services, restoration_of
from coldstart.fetch import FetchRequest, start_threads
from coldstart.keys import find_handlers, key_from_source
from coldstart.restore import Restoration, Restored, rebuild_tree

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from coldstart.config import Settings
    from coldstart.devices.base import Arena, Device
    from coldstart.fetch.base import FetchReport
    from coldstart.manifest import KeyRecord, Manifest

HANDLER = """
import torch
from coldstart import coldstart


def load():
    from safetensors.torch import load_file

    return load_file({file!r})


@coldstart({name!r}, load=load)
def handler(event, model):
    return float(model[event["input"]].float().abs().max())
"""
"""A handler whose state is the model: a tree of tensors, which needs no ``build``. Its input is a tensor's name."""

NAME = "restore-benchmark"


class Snapshot(NamedTuple):
    """The snapshot of a handler, in the store of the environment; nothing of it has been read yet."""

    name: str
    key: KeyRecord
    settings: Settings
    device: Device


def write_handler(path: Path, model_file: Path) -> None:
    """The handler of a model in a file of its own."""
    path.write_text(HANDLER.format(file=str(model_file), name=NAME))


def snapshot_of(handler_path: str) -> Snapshot:
    """What the handler in a file would restore."""
    settings = load()
    device = pick(settings.device)
    (source,) = find_handlers(handler_path)
    (key,) = key_from_source(source, device_type=device.type, environment=environment_now().get).values()
    return Snapshot(source.name or "", key, settings, device)


class Fetched(NamedTuple):
    """A snapshot's bytes in memory, and how they came there."""

    manifest: Manifest
    arena: Arena
    report: FetchReport


def restore(snapshot: Snapshot) -> tuple[dict[str, Any], FetchReport]:
    """Restore it as a start does, to the tensors by name."""
    outcome = _begin(snapshot).outcome()
    assert isinstance(outcome, Restored), outcome
    outcome.arena.seal()
    return rebuild_tree(outcome), outcome.report


def _begin(snapshot: Snapshot) -> Restoration:
    services = Services(snapshot.settings, serving=True, pinned={}, bus=events.EventBus())
    opener = Opener(snapshot.settings, lambda _reason: None)
    return restoration_of(snapshot.name, snapshot.key, opener, snapshot.device, services)


def begin(snapshot: Snapshot, *, client: Any = None) -> Callable[[], Fetched]:
    """Begin to bring it into memory, and return what waits for that.

    As a start does it, with the engine of the settings; or by ``client``, whose ``read_into`` the threads engine calls.
    """
    if client is not None:
        return _begin_by(client, snapshot)
    restoration = _begin(snapshot)

    def wait() -> Fetched:
        outcome = restoration.outcome()
        assert isinstance(outcome, Restored), outcome
        return Fetched(outcome.manifest, outcome.arena, outcome.report)

    return wait


def _begin_by(client: Any, snapshot: Snapshot) -> Callable[[], Fetched]:
    settings = snapshot.settings
    repository = Opener(settings)()
    ref = repository.look_up(snapshot.name, snapshot.key).ref
    assert ref is not None, "there is no such snapshot"
    manifest = repository.manifest(ref.manifest, name=snapshot.name)
    arena = snapshot.device.allocate([segment.length_bytes for segment in manifest.segments])
    fetch = start_threads(FetchRequest(manifest, client, arena, settings.fetch_threads, settings.memory_budget_bytes))
    return lambda: Fetched(manifest, arena, fetch.wait())
