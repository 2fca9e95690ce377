"""Makes the PTX files of the kernels: ``python -m coldstart.devices.kernels.build``, with nvcc on the path.

nvcc writes the version of its own language at the top, which older drivers refuse. The kernels use nothing that is newer
than ``OLDEST_VERSION`` and ``OLDEST_GPU``, so those are written there instead; ``ptxas`` refuses the text if that is not so.
"""

from __future__ import annotations

import os
import re
import subprocess

from coldstart.devices.kernels import BLAKE3, PLANES, SUFFIX

OLDEST_VERSION = "7.8"
"""The PTX of CUDA 11.8: drivers from 520 on take it."""
OLDEST_GPU = "sm_70"
GPUS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
"""What ``assemble`` is to be tried with: Turing to Blackwell."""

_FOLDER = os.path.dirname(__file__)
_OLDEST_COMPILED = "compute_75"
"""The oldest target that nvcc 13 compiles for."""


def compiler_release() -> str:
    """The release of the nvcc on the path, such as ``V13.0.88``. Raises OSError where there is none."""
    said = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    return said.rpartition("release")[2].split()[1].removeprefix(",")


def compiled(name: str) -> str:
    """The text of a module, made from its source. Raises CalledProcessError where nvcc refuses it."""
    source = os.path.join(_FOLDER, name + ".cu")
    command = ["nvcc", "-ptx", f"-arch={_OLDEST_COMPILED}", "-std=c++17", "-Werror=all-warnings", "-o", "-", source]
    made = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    made = re.sub(r"^\s*//.*\n", "", made, flags=re.MULTILINE).lstrip()
    made = _replaced(made, "version", OLDEST_VERSION)
    made = _replaced(made, "target", OLDEST_GPU)
    return f"// Made from {name}.cu by build.py with nvcc {compiler_release()}: change the source, not this.\n{made}"


def assemble(name: str, gpu: str, target: str) -> str:
    """Compile the shipped text of a module for a GPU into the file ``target``; what ptxas says of registers and spills."""
    command = ["ptxas", "-v", f"-arch={gpu}", "-o", target, os.path.join(_FOLDER, name + SUFFIX)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def _replaced(text: str, directive: str, value: str) -> str:
    changed, count = re.subn(rf"^\.{directive} .*$", f".{directive} {value}", text, flags=re.MULTILINE)
    if count != 1:
        raise ValueError(f"nvcc wrote .{directive} {count} times: build.py knows texts with one")
    return changed


def main() -> None:
    """Write the files, and say what each GPU needs for them."""
    for name in (PLANES, BLAKE3):
        with open(os.path.join(_FOLDER, name + SUFFIX), "w") as file:
            file.write(compiled(name))
        for gpu in GPUS:
            print(assemble(name, gpu, os.devnull))


if __name__ == "__main__":
    main()
