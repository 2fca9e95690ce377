"""The machine that a benchmark ran on: what matters to its numbers, and nothing that names it."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

PACKAGES = ("coldstart-gpu", "numpy", "torch", "sentence-transformers", "transformers", "tokenizers", "safetensors")
"""Packages whose versions are written down where they are installed."""

_GIB = 1 << 30


class Machine(NamedTuple):
    """``cores`` and ``memory_bytes`` are what this process may use, not what the hardware has (0: not known)."""

    processor: str
    cores: float
    memory_bytes: int
    system: str
    python: str
    packages: Mapping[str, str]

    @property
    def label(self) -> str:
        """A name for files, such as ``2-cores-intel-xeon-platinum-8481c-23gib``."""
        words = re.sub(r"\((R|TM)\)|CPU|Processor|@.*", " ", self.processor)
        slug = "-".join(re.findall(r"[a-z0-9]+", words.lower())) or "unknown-processor"
        return f"{self.cores:g}-cores-{slug}-{self.memory_bytes / _GIB:.0f}gib"

    def __str__(self) -> str:
        """One line for people."""
        packages = ", ".join(f"{name} {version}" for name, version in self.packages.items())
        memory = f"{self.memory_bytes / _GIB:.1f} GiB"
        return f"{self.processor}, {self.cores:g} cores, {memory}, {self.system}, Python {self.python}, {packages}"


def describe_machine() -> Machine:
    """Look at the machine. What the system does not tell is left empty."""
    return Machine(
        processor=_after_colon("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        cores=_cores(),
        memory_bytes=_memory_bytes(),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        packages=_versions(),
    )


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cores() -> float:
    """Cores that this process may run on, or the processor time that its container is granted, whichever is less."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        return min(usable, round(int(quota[0]) / int(quota[1]), 2))
    return usable


def _memory_bytes() -> int:
    """Memory of the machine, or the limit of the container, whichever is less."""
    total = _after_colon("/proc/meminfo", "MemTotal").removesuffix("kB").strip()
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    sizes = ([int(total) << 10] if total.isdigit() else []) + ([int(limit)] if limit.isdigit() else [])
    return min(sizes, default=0)


def _after_colon(path: str, field: str) -> str:
    found = re.search(rf"^{field}\s*:\s*(.+)$", _read(path), re.MULTILINE)
    return found[1].strip() if found else ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:  # not Linux, or hidden by the container
        return ""
