"""A user's hub cache, and generations of files, for the tests of what is done with files."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from coldstart.repository import Repository
from coldstart.stores.memory import MemoryStore
from tests.generations import capture_of, fetched, sources, write

if TYPE_CHECKING:
    from pathlib import Path

    from coldstart.caches import FileSource

COMMIT = "c" * 40


def hub_home(tmp_path, monkeypatch) -> Path:
    """A hub cache of a user: HF_HOME, with a repository as the hub lays it out, a token, and torch's."""
    folder = tmp_path / "hf"
    monkeypatch.setenv("HF_HOME", str(folder))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    repository = folder / "hub" / "models--org--name"
    for name, data in (("config.json", b"{}"), ("sub/model.safetensors", b"weights"), ("uv.lock", b"lock")):
        blob = repository / "blobs" / f"{len(data)}-{name.replace('/', '-')}"
        pointer = repository / "snapshots" / COMMIT / name
        for path in (blob, pointer):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        pointer.symlink_to(os.path.relpath(blob, pointer.parent))
    (repository / "blobs" / "half.incomplete").write_bytes(b"half")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (folder / "hub" / ".locks" / "models--org--name").mkdir(parents=True)
    (folder / "hub" / ".locks" / "models--org--name" / "x.lock").touch()
    (folder / "token").write_text("hf_secret")
    return folder


def manifest_and_arena(tmp_path, files: dict[str, bytes], root: str = "kept"):
    """A stored generation of these files, in memory."""
    folder = tmp_path / f"originals-{len(list(tmp_path.iterdir()))}"
    paths = {}
    for number, (name, data) in enumerate(files.items()):
        paths[name] = folder / str(number)
        folder.mkdir(exist_ok=True)
        paths[name].write_bytes(data)
    return snapshot(sources(paths, root=root))


def snapshot(files: tuple[FileSource, ...]):
    """A generation of these files as it was captured, and its arena."""
    store = MemoryStore()
    manifest = write(capture_of(files=files), Repository(store)).manifest
    return manifest, fetched(manifest, store)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder: relative name -> bytes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
