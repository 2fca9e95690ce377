"""Compiles the emulation of the kernels: their own sources, run by the CPU."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

SOURCE = "emulation.cpp"
_OPTIONS = (
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-fno-strict-aliasing",
)
CHECKED = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
"""More options: every access outside of memory, or at an address it is not aligned for, ends the process."""


def emulation(folder: Path, *options: str) -> Path:
    """The library in ``folder``, with ``coldstart_emulate``. It needs g++; ``options`` come after our own."""
    from pathlib import Path

    library = folder / "libcoldstart_emulation.so"
    source = Path(__file__).with_name(SOURCE)
    subprocess.run(["g++", *_OPTIONS, "-O2", *options, "-o", str(library), str(source)], check=True)
    return library
