"""What code that was compiled or laid out for one processor depends on: its instruction set."""

from __future__ import annotations

import os

_TELLING = ("avx", "fma", "f16c", "amx", "sse4", "sve", "asimd", "bf16", "i8mm")


def instruction_set() -> str:
    """The processor's name for its instruction set, with the extensions that runtimes choose their code by."""
    machine = os.uname().machine
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            text = file.read(16384)
    except OSError:
        return machine
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return " ".join([machine, *sorted(flag for flag in value.split() if flag.startswith(_TELLING))])
    return machine
