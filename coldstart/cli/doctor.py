"""``coldstart doctor``: what this machine has, what it lacks, and how to get it."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.errors import ColdstartError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

PACKAGES = (
    ("blake3", "", "content addresses"),
    ("numpy", "", "arrays on a CPU"),
    ("zstandard", "", "compressed chunks"),
    ("structlog", "", "log lines"),
    ("pydantic", "", "checked settings"),
    ("boto3", "s3", "stores at s3:// and r2://"),
    ("torch", "torch", "states made of torch modules and tensors"),
    ("onnxruntime", "onnx", "programs on a CPU"),
    ("onnxscript", "onnx-export", "making programs for a CPU"),
    ("tokenizers", "demo", "the demo handler"),
    ("cupy-cuda12x", "gpu", "states on an NVIDIA GPU"),
    ("nvidia-nvcomp-cu12", "gpu", "decompression on the GPU"),
    ("runpod", "runpod", "serving on RunPod"),
    ("modal", "modal", "serving on Modal"),
)


class Finding(NamedTuple):
    """One line: ``state`` is ok, note (worth knowing) or problem (something will not work)."""

    topic: str
    state: str
    text: str


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser("doctor", help="what this machine has, lacks, and how to get it")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Look at everything; the exit status is 1 if something will not work."""
    findings = list(examine())
    if options.json:
        print(json.dumps([finding._asdict() for finding in findings]))
    else:
        for finding in findings:
            print(f"{finding.state:8} {finding.topic:16} {finding.text}")
    return 1 if any(finding.state == "problem" for finding in findings) else 0


def examine() -> Iterator[Finding]:
    """Every finding: platform, settings, device, store, cache, programs, packages."""
    yield _python()
    yield from _system()
    topics = {"settings": _settings, "device": _device, "store": _store, "cache": _cache, "programs": _programs}
    for topic, look in topics.items():
        try:
            yield from look()
        except ColdstartError as error:
            yield Finding(topic, "problem", str(error))
    yield from _packages()


def _python() -> Finding:
    from coldstart.script import PYTHONS

    version = ".".join(map(str, sys.version_info[:3]))
    if version.rpartition(".")[0] not in PYTHONS:
        return Finding("python", "note", f"{version}: tested with {', '.join(PYTHONS)}")
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return Finding("python", "note", f"{version} free-threaded: untested")
    return Finding("python", "ok", version)


def _system() -> Iterator[Finding]:
    import os

    from coldstart.metrics import process_start_seconds

    if sys.platform == "linux":
        yield Finding("system", "ok", f"Linux, {len(os.sched_getaffinity(0))} processors for this process")
    else:
        yield Finding(
            "system", "note", f"{sys.platform}: no memfd and no /proc; starts work, times lack the interpreter's own"
        )
    start = process_start_seconds()
    yield Finding(
        "process start", "ok", f"from the {start.source}, in steps of {1000 * start.resolution_seconds:.0f} ms"
    )


def _settings() -> Iterator[Finding]:
    from coldstart.config import load, unknown_variables

    load()
    unknown = unknown_variables()
    for variable in unknown:
        yield Finding("settings", "problem", str(variable))
    if not unknown:
        yield Finding("settings", "ok", "readable; see coldstart config")


def _device() -> Iterator[Finding]:
    from coldstart.config import load
    from coldstart.devices import pick

    info = pick(load().device).info()
    memory = f"{info.free_bytes / 1e9:.1f} of {info.memory_bytes / 1e9:.1f} GB free"
    yield Finding("device", "ok", f"{info.type}: {info.name}, {memory}")


def _store() -> Iterator[Finding]:
    from coldstart.config import load
    from coldstart.early import Opener

    settings = load()
    if not settings.has_store:
        yield Finding("store", "note", "off: every start runs load")
        return
    store = Opener(settings)().store
    yield from _probe(store.url, store)


def _probe(url: str, store: Any) -> Iterator[Finding]:
    """Try what a worker needs of the store, with one small object that is deleted again."""
    import os

    from coldstart.errors import ConditionFailedError

    key = f"probes/{os.urandom(8).hex()}"
    etag = store.put(key, b"coldstart doctor", if_absent=True)
    try:
        yield Finding("store", "ok", f"{url}: writable, readable")
        part = bytearray(4)
        store.read_into(key, memoryview(part), offset_bytes=5)
        right = part == b"tart"
        ranges = (
            "right" if right else "answered with other bytes, so nothing can be restored from it: use another store"
        )
        yield Finding("store", "ok" if right else "problem", f"ranges: {ranges}")
        create = _refuses(lambda: store.put(key, b"again", if_absent=True), ConditionFailedError)
        swap = _refuses(lambda: store.put(key, b"again", if_match=etag[::-1] + "0"), ConditionFailedError)
        for name, holds in (("create-if-absent", create), ("compare-and-swap", swap)):
            state = "ok" if holds else "note"
            yield Finding(
                "store", state, f"{name}: {'enforced' if holds else 'NOT enforced: two writers may undo each other'}"
            )
    finally:
        store.delete(key)


def _refuses(attempt: Callable[[], Any], error: type[Exception]) -> bool:
    try:
        attempt()
    except error:
        return True
    return False


def _cache() -> Iterator[Finding]:
    from coldstart.config import load
    from coldstart.stores.cache_folder import CacheFolder

    settings = load()
    if not settings.cache:
        yield Finding("cache", "ok", "off: COLDSTART_CACHE names a folder for copies of what a remote store holds")
        return
    folder = CacheFolder(settings.cache, limit_bytes=settings.cache_bytes)
    try:
        folder.prepare()
        usage = folder.usage()
    except OSError as error:
        yield Finding("cache", "problem", f"{settings.cache} cannot be used, so every start asks the store: {error}")
        return
    limit = f"{usage.total_bytes / 1e9:.1f} of at most {settings.cache_bytes / 1e9:.1f} GB"
    yield Finding("cache", "ok", f"{settings.cache}: {usage.copies} copies, {limit}")
    if not settings.store.startswith(("s3://", "r2://")):
        yield Finding("cache", "note", f"not used: {settings.store} is no remote store")


def _programs() -> Iterator[Finding]:
    """Which programs a start here could run: each backend's runtime, and whether the store may give code."""
    from coldstart.config import load
    from coldstart.devices import pick
    from coldstart.errors import ProgramRuntimeError
    from coldstart.programs import BACKENDS, backend_of
    from coldstart.signing import are_required
    from coldstart.trust import distrust

    settings = load()
    if not settings.programs:
        yield Finding("programs", "note", "off (COLDSTART_PROGRAMS): starts restore the state and compute eagerly")
        return
    device_type = pick(settings.device).type
    for name in BACKENDS:
        try:
            platform = backend_of(name).platform(device_type)
        except ProgramRuntimeError as error:
            yield Finding("programs", "note", f"{name}: {error}")
        else:
            yield Finding(
                "programs", "ok", f"{name}: {', '.join(f'{part} {value}' for part, value in platform.items())}"
            )
    if settings.has_store:
        reason = distrust(settings.store, trust_store=settings.trust_store, is_signed=are_required(settings))
        trusted = f"{settings.store} is trusted to give code"
        yield Finding("programs", "note" if reason else "ok", reason or trusted)


def _packages() -> Iterator[Finding]:
    from importlib.metadata import PackageNotFoundError, version

    for name, extra, purpose in PACKAGES:
        try:
            yield Finding(name, "ok", f"{version(name)}  ({purpose})")
        except PackageNotFoundError:
            how = f'pip install "coldstart-gpu[{extra}]"' if extra else "pip install coldstart-gpu"
            yield Finding(name, "note" if extra else "problem", f"not installed, and needed for {purpose}: {how}")
