"""What compiled kernels depend on besides the key: hardware, driver, libraries, compile settings. Nothing is imported for it."""

from __future__ import annotations

import json
import os
import re
import sys
from typing import TYPE_CHECKING

from coldstart.config import environment_now
from coldstart.errors import DeviceError, ProgramRuntimeError
from coldstart.kernel_caches.kinds import KERNELS_ROOT, KINDS, SWITCHES
from coldstart.programs.cpu import instruction_set

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coldstart.devices.base import Device

LIBRARIES = ("torch", "triton", "cupy")
"""The libraries whose kernels are kept."""

_VERSION_FILES = ("version.py", "_version.py", "__init__.py")
_ASSIGNED = re.compile(r"^(__version__|git_version|cuda)\b[^=\n]*=\s*['\"]([^'\"]+)['\"]", re.MULTILINE)
_MOST_READ = 64 << 10
_SETTINGS = ("TORCHINDUCTOR_", "TORCH_COMPILE", "TORCHDYNAMO_", "TRITON_", "CUPY_", "CUDA_FORCE_", "NVCC_")
"""How variables begin that change what is compiled. Libraries key by most of them too; the folder is apart all the same."""
_NO_SETTINGS = frozenset({"TORCHINDUCTOR_COMPILE_THREADS", *(kind.variable for kind in KINDS)})


def library_versions() -> dict[str, str]:
    """Version of each library that an import would find, and torch's commit and CUDA; those that are missing are left out."""
    found = {}
    for library in LIBRARIES:
        assigned = _assigned(library)
        if assigned is None:
            continue
        found[library] = assigned.get("__version__", "?")
        found |= {f"{library} {name}": assigned[name] for name in ("git_version", "cuda") if name in assigned}
    return found


def _assigned(library: str) -> dict[str, str] | None:
    """What the files that say a package's version assign; None where there is no such package."""
    from importlib.util import find_spec

    try:
        spec = find_spec(library)
    except (ImportError, ValueError):  # a module without a spec, which somebody put into sys.modules
        return None
    if spec is None or not spec.origin:
        return None
    for name in _VERSION_FILES:
        try:
            with open(os.path.join(os.path.dirname(spec.origin), name), encoding="utf-8", errors="replace") as file:
                assigned = dict(_ASSIGNED.findall(file.read(_MOST_READ)))
        except OSError:
            continue
        if "__version__" in assigned:
            return assigned
    return {}


def platform_of(device: Device, versions: Mapping[str, str]) -> dict[str, str]:
    """The facts of this platform. Raises ProgramRuntimeError where it cannot be seen which GPU this is."""
    facts = {
        "device": device.type,
        "python": ".".join(map(str, sys.version_info[:2])),
        "processor": instruction_set(),
        "compile settings": compile_settings(environment_now()),
        **versions,
    }
    return facts if device.type == "cpu" else {**facts, **_gpu_facts(device)}


def compile_settings(environ: Mapping[str, str]) -> str:
    """A digest of the variables that change what is compiled, but for those that coldstart sets itself; "" for none."""
    from zlib import crc32

    found = sorted(
        f"{name}={value}"
        for name, value in environ.items()
        if name.startswith(_SETTINGS)
        and name not in _NO_SETTINGS
        and (name not in SWITCHES or SWITCHES[name][1] != value)
    )
    return f"{crc32(chr(10).join(found).encode('utf-8', 'surrogateescape')):08x}" if found else ""


def _gpu_facts(device: Device) -> dict[str, str]:
    """Names and capabilities of the GPUs, and the driver, by NVML, else by /proc, else the name that the device gives."""
    from coldstart.devices.nvml import gpu_facts

    found = gpu_facts()
    if not found:
        try:
            found = {"gpu": device.info().name}
        except DeviceError as error:
            raise ProgramRuntimeError(f"which GPU this is cannot be seen ({error})") from error
    return found


def root_of(facts: Mapping[str, str]) -> str:
    """The root of this platform's caches in a snapshot: the same for the same facts."""
    from blake3 import blake3

    text = json.dumps(sorted(facts.items()))
    return KERNELS_ROOT + str(blake3(text.encode(), derive_key_context="coldstart kernels 1").hexdigest(length=8))


def difference(mine: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """In what two platforms differ, for people: ``torch 2.12 there, 2.13 here``."""
    names = sorted(name for name in {*mine, *theirs} if mine.get(name, "") != theirs.get(name, ""))
    told = [
        f"another {name}"
        if name in ("processor", "compile settings")
        else f"{name} {theirs.get(name) or 'none'} there, {mine.get(name) or 'none'} here"
        for name in names
    ]
    return "; ".join(told)
