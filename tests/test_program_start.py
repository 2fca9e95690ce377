"""Programs in a start: which ones it accepts, and loading one around memory and files of a snapshot."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from coldstart import config, program_start
from coldstart.devices.cpu import CpuDevice
from coldstart.errors import ProgramError, ProgramRuntimeError
from coldstart.exports import export
from coldstart.manifest import Buffer, FileEntry, Pool, Segment
from coldstart.program_start import accepted, load_calls, unsuitable
from coldstart.programs.base import Array, Runner
from coldstart.programs.record import ConstantPlace, Entry, Program, consumer_of, options_digest, program_id
from coldstart.programs.signature import Signature
from tests.generations import manifest_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from coldstart.config import Settings

PLATFORMS = {"onnx": {"device": "cpu", "onnxruntime": "1.32.0"}, "aoti": {"device": "cpu", "torch": "2.13.0"}}
ONNX, AOTI = (program_id(name, PLATFORMS[name]) for name in ("onnx", "aoti"))


class Runtime:
    """A backend without a runtime: its programs add the sum of their constants to their one argument."""

    def __init__(self, name: str, missing: str = "") -> None:
        self._name = name
        self._missing = missing
        self.loaded: list[Any] = []

    def platform(self, device_type: str) -> Any:
        if self._missing:
            raise ProgramRuntimeError(self._missing)
        return {**PLATFORMS[self._name], "device": device_type}

    def load(self, file: Any, constants: Sequence[Any], inputs: Any, outputs: Any) -> Runner:
        self.loaded.append((file, constants))
        values = [constant.data.view(constant.dtype).reshape(constant.shape) for constant in constants]
        return Runner("numpy", lambda arrays: [arrays[0] + sum(value.sum() for value in values)])


@pytest.fixture
def runtimes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Runtime]:
    """Both backends, with runtimes that are there."""
    found = {name: Runtime(name) for name in PLATFORMS}
    monkeypatch.setattr(program_start, "backend_of", lambda name: found[name])
    return found


def settings(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Settings:
    """The settings of a worker with these variables."""
    for name, value in {"COLDSTART_STORE": "memory://", **variables}.items():
        monkeypatch.setenv(name, value)
    return config.load()


# --- what is accepted --------------------------------------------------------------------------------------------------


def test_preferred_first(runtimes: dict[str, Runtime], monkeypatch: pytest.MonkeyPatch) -> None:
    """A start takes what any backend here can run, its device's own first; a handler that names one gets that one alone."""
    own = settings(monkeypatch)
    assert accepted(own, "cpu", "net") == ((ONNX, AOTI), "")
    assert accepted(own, "cpu", "net", backend="aoti") == ((AOTI,), "")
    on_gpu = accepted(own, "cuda", "net").identities
    assert on_gpu[0] == program_id("aoti", {**PLATFORMS["aoti"], "device": "cuda"})
    assert len(on_gpu) == 2


def test_missing_runtimes(runtimes: dict[str, Runtime], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the preferred runtime another one will do, and what is missing is told; without any there is no program."""
    own = settings(monkeypatch)
    runtimes["onnx"]._missing = "no ONNX Runtime"
    assert accepted(own, "cpu", "net") == ((AOTI,), "no ONNX Runtime")
    assert accepted(own, "cpu", "net", backend="onnx") == ((), "no ONNX Runtime")
    runtimes["aoti"]._missing = "no torch"
    assert accepted(own, "cpu", "net") == ((), "no ONNX Runtime")


def test_switch_and_trust(runtimes: dict[str, Runtime], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No program is accepted where programs are off, nor from a store that is not trusted to give code."""
    assert accepted(settings(monkeypatch, COLDSTART_PROGRAMS="off"), "cpu", "net").identities == ()
    monkeypatch.setenv("COLDSTART_PROGRAMS", "on")
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    refused = accepted(settings(monkeypatch, COLDSTART_STORE=f"file://{shared}"), "cpu", "net")
    assert refused.identities == ()
    assert "is not trusted to give code" in refused.obstacle
    trusted = settings(monkeypatch, COLDSTART_STORE=f"file://{shared}", COLDSTART_TRUST_STORE="on")
    assert accepted(trusted, "cpu", "net") == ((ONNX, AOTI), "")


def test_unsuitable() -> None:
    """A program is used for the wishes that it was made for, and for no others."""
    made = Program(ONNX, "onnx", PLATFORMS["onnx"], options_digest(export("encoder")), {}, ())
    assert unsuitable(made, export("encoder")) == ""
    assert unsuitable(made, export("decoder")) == "export(...) was changed since the program was made"
    assert unsuitable(made, None) == "the handler has no program= any more"


# --- loading -----------------------------------------------------------------------------------------------------------

OWN = consumer_of(ONNX)
SIGNATURE = Signature(
    ("x",),
    ["dict", [["x", ["array", 0]]]],
    (Array("x", "float32", (2,)),),
    ["array", 0],
    (Array("y", "float32", (2,)),),
    {},
)
CONSTANTS = (
    ConstantPlace("shared", "float32", (4,), '["w"]', 16),
    ConstantPlace("own", "int64", (2, 1), f"{OWN}/0", 0),
    ConstantPlace("cache", "uint8", (8,), f"{OWN}/64", 0),
)


def program(*constants: ConstantPlace, file: str = "0.onnx") -> Program:
    """A program of one entry point."""
    return Program(ONNX, "onnx", PLATFORMS["onnx"], "", {}, (Entry("", SIGNATURE, file, constants, ()),))


def allocated(name: str, length_bytes: int) -> Any:
    """Zeroed bytes for a pool."""
    return np.zeros(length_bytes, np.uint8)


def restored() -> Any:
    """A snapshot in memory: an array of the state, a constant of the program's own, its file, and room for a cache."""
    segments = (Segment(4, "weights", "both", 256), Segment(8, "weights", OWN, 256), Segment(1, "other", OWN, 256))
    arena = CpuDevice().allocate([segment.length_bytes for segment in segments])
    arena.writable(0)[:32] = np.arange(8, dtype=np.float32).tobytes()
    arena.writable(1)[:16] = np.array([100, 200]).tobytes()
    arena.writable(2)[:5] = b"graph"
    manifest = manifest_of()._replace(
        segments=segments,
        buffers=(Buffer('["w"]', "weights", 0, 0, 32), Buffer(f"{OWN}/0", "weights", 1, 0, 16)),
        files=(FileEntry(OWN, "0.onnx", 0o644, 2, 0, 5),),
        pools=(Pool(f"{OWN}/64", "kv_cache", 8),),
    )
    return SimpleNamespace(manifest=manifest, arena=arena)


def test_loading(runtimes: dict[str, Runtime]) -> None:
    """Constants are where the snapshot has them, caches are memory of their own, and the call answers with them."""
    snapshot = restored()
    calls = load_calls(program(*CONSTANTS), snapshot, allocated)
    assert calls[""](np.zeros(2, np.float32)).tolist() == [4 + 5 + 6 + 7 + 300.0] * 2
    ((file, (shared, own, cache)),) = runtimes["onnx"].loaded
    assert bytes(file) == b"graph"
    assert (shared.name, shared.dtype, shared.shape, len(shared.data)) == ("shared", "float32", (4,), 16)
    assert np.shares_memory(shared.data, snapshot.arena.array(0, 0, 32))
    assert np.shares_memory(own.data, snapshot.arena.array(1, 0, 16))
    assert not cache.data.any()
    cache.data[:] = 1


@pytest.mark.parametrize(
    "place",
    [
        CONSTANTS[0]._replace(buffer="nowhere"),
        CONSTANTS[0]._replace(offset_bytes=20),
        CONSTANTS[0]._replace(shape=(5,)),
        CONSTANTS[0]._replace(shape=(1 << 40, 1 << 40)),
        CONSTANTS[2]._replace(shape=(9,)),
        CONSTANTS[1]._replace(dtype="complex128"),
    ],
)
def test_constants_outside(runtimes: dict[str, Runtime], place: ConstantPlace) -> None:
    """A record that points outside the snapshot's memory is refused by the constant's name, before the runtime sees it."""
    with pytest.raises(
        ProgramError, match=f"constant '{place.name}' of the program lies outside the snapshot's buffers"
    ):
        load_calls(program(place), restored(), allocated)
    assert runtimes["onnx"].loaded == []


def test_missing_file(runtimes: dict[str, Runtime]) -> None:
    """A program whose file the snapshot does not have, or has for another program, is refused by its name."""
    with pytest.raises(ProgramError, match=r"the program's file '1\.onnx' is not in the snapshot"):
        load_calls(program(file="1.onnx"), restored(), allocated)
    snapshot = restored()
    snapshot.manifest = snapshot.manifest._replace(files=(FileEntry("kept", "0.onnx", 0o644, 2, 0, 5),))
    with pytest.raises(ProgramError, match=r"the program's file '0\.onnx' is not in the snapshot"):
        load_calls(program(), snapshot, allocated)
