"""Libraries that compile, as far as their caches go: they look where their variables say, and write files laid out as theirs are.

CuPy: one file a kernel. Triton: a folder a kernel, with a list of its files by their absolute paths. The driver: an index
beside folders of hexadecimal names. Inductor: a folder a graph, in which each compilation writes another name.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid


def cupy(name: str) -> bool:
    """Have CuPy's kernel; whether it was in the cache."""
    folder = os.environ["CUPY_CACHE_DIR"]
    path = os.path.join(folder, f"{hashlib.md5(name.encode()).hexdigest()}_2.cubin")
    if os.path.exists(path):
        with open(path) as file:
            if not file.read().startswith("cubin of"):
                raise RuntimeError("device kernel image is invalid")
        return True
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "tmpabcd_123"), "w"):
        pass  # what a library that was killed leaves
    with open(path, "w") as file:
        file.write(f"cubin of {name}")
    return False


def triton(name: str) -> bool:
    """Have Triton's kernel, which is there if every file is that its list names; whether it was."""
    folder = os.path.join(os.environ["TRITON_CACHE_DIR"], hashlib.sha256(name.encode()).hexdigest()[:52].upper())
    listed = os.path.join(folder, f"__grp__{name}.json")
    if os.path.exists(listed):
        with open(listed) as file:
            paths = json.load(file)["child_paths"]
        return all(os.path.exists(path) for path in paths.values()) and all(
            path.startswith(folder) for path in paths.values()
        )
    os.makedirs(os.path.join(folder, f"tmp.pid_{os.getpid()}_{uuid.uuid4()}"))
    names = {ending: os.path.join(folder, f"{name}.{ending}") for ending in ("cubin", "json", "ptx")}
    for ending, path in names.items():
        with open(path, "w") as file:
            file.write(f"{ending} of {name}")
    with open(listed, "w") as file:
        json.dump({"child_paths": names}, file)
    return False


def driver(name: str) -> bool:
    """Have the driver's kernel, which is there if the index says so; whether it was."""
    folder = os.environ["CUDA_CACHE_PATH"]
    index = os.path.join(folder, "index")
    known = open(index).read().split() if os.path.exists(index) else []  # noqa: SIM115
    if name in known:
        return os.path.exists(os.path.join(folder, "a", "3", name))
    os.makedirs(os.path.join(folder, "a", "3"), exist_ok=True)
    with open(os.path.join(folder, "a", "3", name), "w") as file:
        file.write(f"machine code of {name}")
    with open(index, "w") as file:
        file.write("\n".join([*known, name]))
    return False


def inductor(name: str) -> bool:
    """Have Inductor's graph, which is there if its folder holds anything; whether it was."""
    key = "f" + hashlib.sha256(name.encode()).hexdigest()[:50]
    folder = os.path.join(os.environ["TORCHINDUCTOR_CACHE_DIR"], "fxgraph", key[1:3], key)
    if os.path.isdir(folder) and os.listdir(folder):
        return True
    os.makedirs(folder, exist_ok=True)
    os.makedirs(os.path.join(os.environ["TORCHINDUCTOR_CACHE_DIR"], "locks"), exist_ok=True)
    with open(os.path.join(os.environ["TORCHINDUCTOR_CACHE_DIR"], "locks", f"{key}.lock"), "w"):
        pass
    with open(os.path.join(folder, uuid.uuid4().hex), "w") as file:
        file.write(f"pickle of {name}, {uuid.uuid4()}")
    return False


ALL = (cupy, triton, driver, inductor)


def compile_all(name: str) -> list[bool]:
    """Have each library's kernel of this name; which were in their caches."""
    return [library(name) for library in ALL]
