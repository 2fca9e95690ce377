"""Whether the machine's C++ compiler takes all vector instructions that torch may ask it for, without running it."""

from __future__ import annotations

import os
import re

from coldstart.config import read_variable

OLDEST = 13
"""The first major version of g++ that takes every extension that Inductor knows of, AMX with fp16 among them."""
OLDEST_BEFORE_AMX = 11
_NAMED = re.compile(r"g\+\+-(\d{1,3})\Z")
"""What a distribution calls the file behind ``g++``."""


def takes_all_instructions(processor: str) -> bool:
    """Whether nothing need be tried out. ``processor``: as ``programs.cpu`` describes it.

    Where there is no compiler nothing can be compiled either way. One whose version its name does not tell is to be tried.
    """
    path = _compiler()
    if not path:
        return True
    named = _NAMED.search(os.path.realpath(path))
    return named is not None and int(named[1]) >= (OLDEST if "amx" in processor else OLDEST_BEFORE_AMX)


def _compiler() -> str:
    """Where the compiler is that torch would run, "" for nowhere."""
    name = read_variable("CXX") or "g++"
    if "/" in name:
        return name if os.access(name, os.X_OK) else ""
    folders = (read_variable("PATH") or os.defpath).split(os.pathsep)
    return next((path for folder in folders if os.access(path := os.path.join(folder, name), os.X_OK)), "")
