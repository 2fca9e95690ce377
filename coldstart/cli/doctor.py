"""``coldstart doctor``: what this machine has, what it lacks, and how to get it."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.errors import CodecError, ColdstartError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from coldstart.recovery import Mode
    from coldstart.stores.base import Store

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
    ("nvidia-libnvcomp-cu12", "gpu", "decompression on the GPU"),
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
    if info.type == "cuda":
        yield from _gpu_codecs()


def _gpu_codecs() -> Iterator[Finding]:
    from coldstart.codecs.nvcomp import Nvcomp

    try:
        nvcomp = Nvcomp.load()
    except CodecError as error:
        yield Finding("device", "note", f"chunks are decoded by the processor and not by the GPU: {error}")
        return
    yield Finding("device", "ok", f"nvCOMP {nvcomp.version} decodes on the GPU")


def _store() -> Iterator[Finding]:
    from coldstart.config import load
    from coldstart.early import Opener
    from coldstart.recovery import MODES

    settings = load()
    if not settings.has_store:
        yield Finding("store", "note", "off: every start runs load")
        return
    mode = MODES[settings.recovery]
    store = Opener(settings)().store
    for number, each in enumerate(store.stores):
        yield from _probe(f"replica {number}" if number else "store", each)
    yield Finding("recovery", "ok", f"{settings.recovery}: {_steps(mode, replicas=len(store.stores) - 1)}")


def _steps(mode: Mode, *, replicas: int) -> str:
    """What a start does when its snapshot cannot be used, in the order in which it does it."""
    allowed = (mode.replicas and replicas, mode.previous, mode.loads)
    words = ("a replica", "the previous generation", "load")
    steps = ["the chunk again", *(word for word, may in zip(words, allowed, strict=True) if may)]
    return ", ".join(steps) + ("" if mode.loads else "; then the start fails")


def _probe(topic: str, store: Store) -> Iterator[Finding]:
    """Try what a worker needs of a store, with one small object that is deleted again."""
    from coldstart.stores.probing import MOST_SKEW_SECONDS, probe

    found = probe(store)
    yield Finding(topic, "ok", f"{store.url}: writable, readable")
    if found.capabilities.ranges:
        yield Finding(topic, "ok", "ranges: right")
    else:
        text = "ranges: answered with other bytes, so nothing can be restored from it: use another store"
        yield Finding(topic, "problem", text)
    creates, swaps = found.capabilities.create_if_absent, found.capabilities.compare_and_swap
    for name, holds in (("create-if-absent", creates), ("compare-and-swap", swaps)):
        text = "enforced" if holds else "NOT enforced: two writers may undo each other"
        yield Finding(topic, "ok" if holds else "note", f"{name}: {text}")
    ahead = "ahead of" if found.skew_seconds > 0 else "behind"
    skew = f"{store.url} is {abs(found.skew_seconds):.0f} s {ahead} this machine"
    is_right = abs(found.skew_seconds) <= MOST_SKEW_SECONDS
    text = skew if is_right else f"{skew}: set this machine's clock, a store refuses signatures from 900 s on"
    yield Finding("clock", "ok" if is_right else "problem", text)


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
