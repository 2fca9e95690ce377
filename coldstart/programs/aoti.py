"""Programs that torch runs: a package of native code that AOTInductor compiled, and weights that stay where they are.

torch's package loader is all that runs it: neither Inductor nor Dynamo is imported. The loader believes what it is told:
it reads no shape, no dtype and no stride of what it is given, and of a missing buffer it makes a null pointer. So every
name and every length is checked here, and every call by the layer above.

Constants are bound as they lie in memory, and a cache among them is written there. The package is unpacked here into a
folder that is gone once it is loaded: the loader's own would be under /tmp, whatever TMPDIR says, and would outlive a
process that is killed.
"""

from __future__ import annotations

import math
import os
import re
from typing import TYPE_CHECKING, Any

from coldstart.devices.nvml import gpu_facts
from coldstart.errors import DeviceError, ProgramError, ProgramRuntimeError
from coldstart.frameworks import torch as for_torch
from coldstart.programs.base import Backend, Runner
from coldstart.programs.calls import as_torch
from coldstart.programs.cpu import instruction_set

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coldstart.programs.base import Array, Constant

OLDEST = (2, 13)
"""The first torch whose loader takes an unpacked package."""

MODEL = "model"
"""The name of the one program in a package."""

SETTINGS: Mapping[str, Any] = {
    "aot_inductor.package": True,
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.package_constants_on_disk_format": "pickle_weights",  # hands the constants out; nothing is pickled
    "aot_inductor.embed_kernel_binary": True,  # kernels of a GPU too: the folder is gone when they are first called
    "aot_inductor.precompile_headers": False,  # they lie in /tmp for ever, and one program is made no faster by them
    "aot_inductor.enable_line_tables": False,  # four fifths of a small package
    "always_keep_tensor_constants": True,
    "joint_graph_constant_folding": False,  # it takes a buffer of one element for a constant, and drops what is written to it
    "cpp.dynamic_threads": True,  # without it, the number of threads that the compiler had is compiled in
    "cpp.march": "",  # not "native": then the vector extensions in ``platform`` are all that the code depends on
}
"""How Inductor compiles. A change makes other programs, so they are part of the platform."""

_REMEDY = "pip install 'torch>={}'".format(".".join(map(str, OLDEST)))
_NO_EXECUTION = ("failed to map segment", "Operation not permitted", "Permission denied")
_NO_LIBRARY = ("cannot open shared object file", "not found (required by", "undefined symbol")
_VERSION = re.compile(r"^(__version__|git_version)\s*=\s*['\"]([^'\"]+)['\"]", re.MULTILINE)


class Aoti(Backend):
    """AOTInductor."""

    name = "aoti"

    def platform(self, device_type: str) -> Mapping[str, str]:
        """Torch to the commit it was built from, the C library, the instruction set, the settings; the GPU's name."""
        version, commit = installed_version()
        if not version:
            raise ProgramRuntimeError(f"the snapshot's program needs torch, which is not installed: {_REMEDY}")
        if _numbers(version) < OLDEST:
            raise ProgramRuntimeError(f"torch {version} is too old to run programs: {_REMEDY}")
        facts = {
            "device": device_type,
            "torch": version,
            "torch_commit": commit,
            "libc": _libc(),
            "processor": instruction_set(),
            "settings": " ".join(f"{name}={value}" for name, value in sorted(SETTINGS.items())),
        }
        return facts if device_type == "cpu" else {**facts, "gpu": _gpu_names()}

    def import_runtime(self) -> None:
        """Import torch (1.7 to 2.4 s)."""
        _runtime()

    def load(
        self, file: memoryview, constants: Sequence[Constant], inputs: Sequence[Array], outputs: Sequence[Array]
    ) -> Runner:
        """Load the package and bind the constants, which it keeps alive and, where they are a cache, writes to."""
        torch = _runtime()
        loader = _unpacked(torch, file)
        held = {constant.name: _tensor(torch, constant) for constant in constants}
        _check_names(set(loader.get_constant_fqns()), set(held))
        try:
            loader.load_constants(held, use_inactive=False, check_full_update=True, user_managed=True)
        except RuntimeError as error:
            raise ProgramError(f"the program does not take its constants: {_first_line(error)}") from error
        return Runner("torch", _Package(torch, loader, held, len(inputs), len(outputs)).run)


class _Package:
    """A loaded package with what it stands on: it has the constants' addresses, not the constants."""

    def __init__(self, torch: Any, loader: Any, held: Mapping[str, Any], inputs: int, outputs: int) -> None:
        self._no_grad = torch.no_grad
        self._c_order = torch.contiguous_format
        self._run = loader.run
        self._held = held
        self._addresses = {tensor.untyped_storage().data_ptr() for tensor in held.values()}
        self._inputs = inputs
        self._outputs = outputs
        self._device = next((tensor.device for tensor in held.values()), None)

    def run(self, arrays: Sequence[Any]) -> Sequence[Any]:
        """One inference. A second one that comes meanwhile waits for it."""
        if len(arrays) != self._inputs:
            raise ProgramError(f"the program takes {self._inputs} arrays and was given {len(arrays)}")
        try:
            with self._no_grad():
                results = self._run([as_torch(array, self._device) for array in arrays])
        except RuntimeError as error:
            raise ProgramError(f"the program failed: {_first_line(error)}") from error
        if len(results) != self._outputs:
            raise ProgramError(f"the program gave {len(results)} arrays instead of {self._outputs}")
        return [self._own(result) for result in results]

    def _own(self, result: Any) -> Any:
        """The result in C order, and a copy of one that is a view of a constant: the next call may write to that."""
        is_view = result.untyped_storage().data_ptr() in self._addresses
        return result.clone(memory_format=self._c_order) if is_view else result.contiguous()


def installed_version() -> tuple[str, str]:
    """Version and commit of the torch that an import would find, empty for none; nothing is imported."""
    from importlib.util import find_spec

    spec = find_spec("torch")
    if spec is None or not spec.origin:
        return "", ""
    try:
        with open(os.path.join(os.path.dirname(spec.origin), "version.py"), encoding="utf-8") as file:
            found = dict(_VERSION.findall(file.read()))
    except OSError:
        return "", ""
    return found.get("__version__", ""), found.get("git_version", "")


def _libc() -> str:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, ValueError, OSError):  # another C library, or another system
        return ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _gpu_names() -> str:
    """The GPUs of this machine: a package has kernels for one architecture. Where nothing else tells, the driver is opened."""
    from coldstart.devices.cuda_driver import open_gpu

    try:
        return gpu_facts().get("gpu") or open_gpu(0).name
    except DeviceError as error:
        raise ProgramRuntimeError(
            f"which GPU this is cannot be seen ({error}), so no program can be chosen for it: start without one"
        ) from error


def _runtime() -> Any:
    try:
        import torch
    except ImportError as error:
        raise ProgramRuntimeError(f"torch cannot be imported: {error}; {_REMEDY}") from error
    if not hasattr(torch._C, "_aoti"):  # noqa: SLF001  the loader has no public name that does not import Inductor
        raise ProgramRuntimeError("this build of torch has no loader of AOTInductor packages: use PyTorch's own wheels")
    return torch


def _unpacked(torch: Any, data: memoryview) -> Any:
    """The package loader, with the package's library mapped and nothing left on disk."""
    import io
    import tempfile
    import zipfile

    try:
        with tempfile.TemporaryDirectory(prefix="coldstart-package-") as folder:
            zipfile.ZipFile(io.BytesIO(data)).extractall(folder)
            return _loader(torch, folder)
    except (zipfile.BadZipFile, EOFError) as error:
        raise ProgramError(f"the program's package is damaged: {error}") from error
    except OSError as error:
        raise ProgramRuntimeError(
            f"the program's package cannot be unpacked ({error}): set TMPDIR to a folder with {len(data)} bytes of room"
        ) from error


def _loader(torch: Any, folder: str) -> Any:
    try:
        # Not single threaded, one runner (it serves one call at a time), and the device that the package is for.
        return torch._C._aoti.AOTIModelPackageLoader(folder, MODEL, False, 1, -1)  # noqa: SLF001  see _runtime
    except RuntimeError as error:
        text = str(error)
        if any(sign in text for sign in _NO_EXECUTION):
            raise ProgramRuntimeError(
                f"native code may not be run from {os.path.dirname(folder)} (mounted noexec?): set TMPDIR to a folder"
                f" where it may; {_first_line(error)}"
            ) from error
        if any(sign in text for sign in _NO_LIBRARY):
            raise ProgramRuntimeError(
                f"the program needs a library that this image lacks, or has in another version: {_first_line(error)};"
                " use the image that the snapshot was made in"
            ) from error
        raise ProgramError(f"torch refused the program's package: {_first_line(error)}") from error


def _tensor(torch: Any, constant: Constant) -> Any:
    """The constant as a tensor over the same bytes."""
    dtype = getattr(torch, constant.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ProgramError(
            f"constant {constant.name!r} of the program is of {constant.dtype!r}, which torch does not have"
        )
    length_bytes = math.prod(constant.shape) * dtype.itemsize
    if constant.data.nbytes != length_bytes:
        raise ProgramError(
            f"constant {constant.name!r} of the program is {constant.data.nbytes} bytes long, not {length_bytes}"
        )
    try:
        flat = for_torch.flat_bytes(constant.data)
        if not length_bytes:  # numpy gives it no stride
            return torch.empty(constant.shape, dtype=dtype, device=flat.device)
        return flat.view(dtype).reshape(constant.shape)
    except (RuntimeError, BufferError) as error:
        raise ProgramError(f"constant {constant.name!r} of the program has impossible bytes: {error}") from error


def _check_names(wanted: set[str], given: set[str]) -> None:
    if missing := sorted(wanted - given):
        raise ProgramError(f"the program's record lacks constants that its code reads: {', '.join(missing[:8])}")
    if unknown := sorted(given - wanted):
        raise ProgramError(f"the program's record has constants that its code does not know: {', '.join(unknown[:8])}")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
