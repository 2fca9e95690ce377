"""nvCOMP 6, by its C library: batches of zstd frames and of ANS chunks, decoded and encoded on the GPU.

The library alone is used (package ``nvidia-libnvcomp-cu12`` or ``-cu13``, nothing of it Python): its calls take addresses and
a stream, return once the work is queued, and allocate nothing, so that scratch is the caller's to bound. Loading it needs no
GPU, and neither do the calls that compute sizes.

- Addresses and streams are plain integers: of device memory, and the driver's handle (0: the default stream).
- Arrays of a batch lie in device memory too, and are read when the stream gets there: addresses and sizes of 8 bytes each,
  statuses of 4.
- Nothing a call returns says that the work went well: each item's status does, once the stream is there (``status_name``).
- **Verify stored bytes before they get here**: nvCOMP calls what it does with malformed ones undefined.
- ANS bytes are read by the major version that wrote them, and by no CPU.

Other majors are refused: 5 and 6 differ in arguments and in the bytes of ANS.
"""

from __future__ import annotations

import ctypes
import glob
import os
from ctypes import POINTER, Structure, byref, c_char, c_int, c_size_t, c_uint8, c_uint32, c_void_p
from typing import Any, NamedTuple

from coldstart.config import read_variable
from coldstart.errors import CodecError

MAJOR = 6
"""The major version of nvCOMP that this binding is written for."""

LIBRARY = f"libnvcomp.so.{MAJOR}"

ANS_MAX_RAW_BYTES = 1 << 24
"""The longest chunk that the ANS encoder takes."""

_INSTALL = "pip install 'nvidia-libnvcomp-cu12>=6,<7' (or -cu13, whichever CUDA the driver has)"

SUCCESS = 0
CANNOT_DECOMPRESS = 12
STATUS_NAMES = {
    SUCCESS: "nvcompSuccess",
    10: "nvcompErrorInvalidValue",
    11: "nvcompErrorNotSupported",
    CANNOT_DECOMPRESS: "nvcompErrorCannotDecompress",
    13: "nvcompErrorBadChecksum",
    14: "nvcompErrorCannotVerifyChecksums",
    15: "nvcompErrorOutputBufferTooSmall",
    16: "nvcompErrorWrongHeaderLength",
    17: "nvcompErrorAlignment",
    18: "nvcompErrorChunkSizeTooLarge",
    19: "nvcompErrorCannotCompress",
    20: "nvcompErrorWrongInputLength",
    21: "nvcompErrorBatchSizeTooLarge",
    22: "nvcompErrorSubChunkCountTooLarge",
    23: "nvcompErrorSubChunkCountTooSmall",
    24: "nvcompErrorOutputBufferAlignmentTooSmall",
    1000: "nvcompErrorCudaError",
    10000: "nvcompErrorInternal",
}
"""nvcompStatus_t, of calls and of single items."""

_REMEDIES = {
    1000: "is there a GPU with a driver for CUDA 12 or newer (nvidia-smi), and is its context current on this thread?",
    11: "store the snapshot with the codec planes+zstd",
    18: "store the snapshot in smaller chunks",
    21: "decode fewer chunks at once",
}
_OTHER_REMEDY = (
    "store the snapshot with the codec planes+zstd, and report this with the versions of nvCOMP and of the driver"
)

BACKEND_DEFAULT = 0
TYPE_UCHAR = 1
TYPE_FLOAT16 = 10
"""Halves of any format: exponents and the rest are coded apart."""
_RANS = 0


class Properties(Structure):
    """nvcompProperties_t. ``version`` is 1000 * major + 100 * minor + patch."""

    _fields_ = (("version", c_uint32), ("cudart_version", c_uint32))


class AlignmentRequirements(Structure):
    """nvcompAlignmentRequirements_t."""

    _fields_ = (("input", c_size_t), ("output", c_size_t), ("temp", c_size_t))


class ZstdDecompressOptions(Structure):
    """nvcompBatchedZstdDecompressOpts_t, which is passed by value."""

    _fields_ = (("backend", c_int), ("reserved", c_char * 60))


class AnsCompressOptions(Structure):
    """nvcompBatchedANSCompressOpts_t, which is passed by value."""

    _fields_ = (
        ("type", c_int),
        ("data_type", c_int),
        ("max_sub_chunk_count", c_uint8),
        ("states_per_lane", c_uint8),
        ("histogram_reduction_log2", c_uint8),
        ("reserved", c_char * 53),
    )


class AnsDecompressOptions(Structure):
    """nvcompBatchedANSDecompressOpts_t, which is passed by value."""

    _fields_ = (
        ("backend", c_int),
        ("data_type", c_int),
        ("max_sub_chunk_count", c_uint8),
        ("states_per_lane", c_uint8),
        ("skip_validate", c_uint8),
        ("reserved", c_char * 53),
    )


class Alignments(NamedTuple):
    """What the address of each input, of each output and of the scratch has to be a multiple of, in bytes."""

    input_bytes: int
    output_bytes: int
    scratch_bytes: int


class DecodeBatch(NamedTuple):
    """Stored items to decode: device addresses, but for ``item_count``, the length of each array, and ``scratch_bytes``.

    In: ``stored`` (addresses of the items), ``stored_bytes``, ``targets`` (addresses) and ``room_bytes`` (how much fits there).
    Out: ``decoded_bytes`` and ``statuses``. ``scratch`` may be 0 where no scratch is needed.
    """

    item_count: int
    stored: int
    stored_bytes: int
    targets: int
    room_bytes: int
    decoded_bytes: int
    statuses: int
    scratch: int
    scratch_bytes: int


class EncodeBatch(NamedTuple):
    """Raw items to encode: device addresses as in ``DecodeBatch``, and ``largest_raw_bytes``, the size of the largest item.

    In: ``raw`` (addresses of the items), ``raw_bytes``, ``targets`` (addresses, with room for ``ans_max_stored_bytes`` each).
    Out: ``stored_bytes`` and ``statuses``.
    """

    item_count: int
    raw: int
    raw_bytes: int
    largest_raw_bytes: int
    targets: int
    stored_bytes: int
    statuses: int
    scratch: int
    scratch_bytes: int


def status_name(status: int) -> str:
    """Return NVIDIA's name of a status, or its number where this version of coldstart does not know it."""
    return STATUS_NAMES.get(status, f"nvCOMP's status {status}")


class Nvcomp:
    """The loaded library. Safe from several threads; each call needs the device's context current on its thread."""

    def __init__(self, library: ctypes.CDLL, *, path: str) -> None:
        self._library = library
        self.path = path
        self.version = _version(library, path)
        """Like ``6.0.0``."""
        _declare(library)

    @classmethod
    def load(cls, path: str | None = None) -> Nvcomp:
        """The library at ``path``; without one, the one that the loader finds, else that of NVIDIA's package.

        Raises CodecError: there is none, it cannot be loaded, or it is of another major version.
        """
        if path is not None:
            return cls(_open(path), path=path)
        try:
            return cls(ctypes.CDLL(LIBRARY), path=LIBRARY)  # one that is loaded already, or that LD_LIBRARY_PATH names
        except OSError:
            found = _find_in_package()
            return cls(_open(found), path=found)

    def zstd_alignments(self) -> Alignments:
        """What ``zstd_decode`` needs of addresses."""
        return self._alignments("nvcompBatchedZstdDecompressGetRequiredAlignments", _zstd_options())

    def zstd_temp_bytes(self, count: int, *, largest_raw_bytes: int, total_raw_bytes: int, stream: int = 0) -> int:
        """Scratch that ``zstd_decode`` needs for ``count`` frames: about three times what they decode to."""
        return self._temp_bytes(
            "nvcompBatchedZstdDecompressGetTempSize",
            count, largest_raw_bytes, _zstd_options(), total_raw_bytes, stream,
        )  # fmt: skip

    def zstd_decode(self, batch: DecodeBatch, *, stream: int) -> None:
        """Queue the decoding of standard zstd frames, each with its content's size in its header."""
        self._decode("nvcompBatchedZstdDecompressAsync", batch, _zstd_options(), stream)

    def ans_max_stored_bytes(self, raw_bytes: int, *, item_bytes: int) -> int:
        """Room that ``ans_encode`` needs for a chunk of ``raw_bytes``, which is more than that."""
        most = c_size_t()
        self._call("nvcompBatchedANSCompressGetMaxOutputChunkSize", raw_bytes, _ans_encoding(item_bytes), byref(most))
        return most.value

    def ans_encode_alignments(self, *, item_bytes: int) -> Alignments:
        """What ``ans_encode`` needs of addresses."""
        return self._alignments("nvcompBatchedANSCompressGetRequiredAlignments", _ans_encoding(item_bytes))

    def ans_encode_temp_bytes(
        self, count: int, *, largest_raw_bytes: int, total_raw_bytes: int, item_bytes: int, stream: int = 0
    ) -> int:
        """Scratch that ``ans_encode`` needs for ``count`` chunks; may be 0."""
        return self._temp_bytes(
            "nvcompBatchedANSCompressGetTempSize",
            count, largest_raw_bytes, _ans_encoding(item_bytes), total_raw_bytes, stream,
        )  # fmt: skip

    def ans_encode(self, batch: EncodeBatch, *, item_bytes: int, stream: int) -> None:
        """Queue the encoding of chunks of at most ``ANS_MAX_RAW_BYTES``, each of whole items."""
        self._call(
            "nvcompBatchedANSCompressAsync",
            batch.raw, batch.raw_bytes, batch.largest_raw_bytes, batch.item_count, batch.scratch, batch.scratch_bytes,
            batch.targets, batch.stored_bytes, _ans_encoding(item_bytes), batch.statuses, stream,
        )  # fmt: skip

    def ans_decode_alignments(self, *, item_bytes: int) -> Alignments:
        """What ``ans_decode`` needs of addresses: 16 bytes for stored chunks too."""
        return self._alignments("nvcompBatchedANSDecompressGetRequiredAlignments", _ans_decoding(item_bytes))

    def ans_decode_temp_bytes(
        self, count: int, *, largest_raw_bytes: int, total_raw_bytes: int, item_bytes: int, stream: int = 0
    ) -> int:
        """Scratch that ``ans_decode`` needs for ``count`` chunks; may be 0."""
        return self._temp_bytes(
            "nvcompBatchedANSDecompressGetTempSize",
            count, largest_raw_bytes, _ans_decoding(item_bytes), total_raw_bytes, stream,
        )  # fmt: skip

    def ans_decode(self, batch: DecodeBatch, *, item_bytes: int, stream: int) -> None:
        """Queue the decoding of chunks that ``ans_encode`` wrote for items of the same size."""
        self._decode("nvcompBatchedANSDecompressAsync", batch, _ans_decoding(item_bytes), stream)

    def _decode(self, function: str, batch: DecodeBatch, options: Structure, stream: int) -> None:
        self._call(
            function,
            batch.stored, batch.stored_bytes, batch.room_bytes, batch.decoded_bytes, batch.item_count, batch.scratch,
            batch.scratch_bytes, batch.targets, options, batch.statuses, stream,
        )  # fmt: skip

    def _temp_bytes(
        self, function: str, count: int, largest_bytes: int, options: Structure, total_bytes: int, stream: int
    ) -> int:
        needed = c_size_t()
        self._call(function, count, largest_bytes, options, byref(needed), total_bytes, stream)
        return needed.value

    def _alignments(self, function: str, options: Structure) -> Alignments:
        found = AlignmentRequirements()
        self._call(function, options, byref(found))
        return Alignments(found.input, found.output, found.temp)

    def _call(self, function: str, *arguments: Any) -> None:
        """Raise CodecError unless the function returns nvcompSuccess."""
        if status := getattr(self._library, function)(*arguments):
            raise CodecError(
                f"{function} of nvCOMP {self.version} failed: {status_name(status)} ({status}); "
                f"{_REMEDIES.get(status, _OTHER_REMEDY)}"
            )


def _zstd_options() -> ZstdDecompressOptions:
    return ZstdDecompressOptions(backend=BACKEND_DEFAULT)


def _ans_type(item_bytes: int) -> int:
    return TYPE_FLOAT16 if item_bytes == 2 else TYPE_UCHAR  # noqa: PLR2004  two bytes: bf16 and fp16


def _ans_encoding(item_bytes: int) -> AnsCompressOptions:
    return AnsCompressOptions(type=_RANS, data_type=_ans_type(item_bytes))


def _ans_decoding(item_bytes: int) -> AnsDecompressOptions:
    return AnsDecompressOptions(backend=BACKEND_DEFAULT, data_type=_ans_type(item_bytes))


_DECODE = (c_void_p, c_void_p, c_void_p, c_void_p, c_size_t, c_void_p, c_size_t, c_void_p)
_ENCODE = (c_void_p, c_void_p, c_size_t, c_size_t, c_void_p, c_size_t, c_void_p, c_void_p)
_PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "nvcompBatchedZstdDecompressGetRequiredAlignments": (ZstdDecompressOptions, POINTER(AlignmentRequirements)),
    "nvcompBatchedANSCompressGetRequiredAlignments": (AnsCompressOptions, POINTER(AlignmentRequirements)),
    "nvcompBatchedANSDecompressGetRequiredAlignments": (AnsDecompressOptions, POINTER(AlignmentRequirements)),
    "nvcompBatchedZstdDecompressGetTempSize": (
        c_size_t, c_size_t, ZstdDecompressOptions, POINTER(c_size_t), c_size_t, c_void_p,
    ),
    "nvcompBatchedANSCompressGetTempSize": (
        c_size_t, c_size_t, AnsCompressOptions, POINTER(c_size_t), c_size_t, c_void_p,
    ),
    "nvcompBatchedANSDecompressGetTempSize": (
        c_size_t, c_size_t, AnsDecompressOptions, POINTER(c_size_t), c_size_t, c_void_p,
    ),
    "nvcompBatchedANSCompressGetMaxOutputChunkSize": (c_size_t, AnsCompressOptions, POINTER(c_size_t)),
    "nvcompBatchedZstdDecompressAsync": (*_DECODE, ZstdDecompressOptions, c_void_p, c_void_p),
    "nvcompBatchedANSDecompressAsync": (*_DECODE, AnsDecompressOptions, c_void_p, c_void_p),
    "nvcompBatchedANSCompressAsync": (*_ENCODE, AnsCompressOptions, c_void_p, c_void_p),
}  # fmt: skip


def _declare(library: ctypes.CDLL) -> None:
    for name, arguments in _PROTOTYPES.items():
        function = getattr(library, name)
        function.restype = c_int
        function.argtypes = arguments


def _open(path: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(path)
    except OSError as error:
        raise CodecError(f"nvCOMP could not be loaded from {path}: {error}; {_INSTALL}") from error


def _version(library: ctypes.CDLL, path: str) -> str:
    """Like ``6.0.0``. Raises CodecError where the library is no nvCOMP, or not of this major version."""
    properties = Properties()
    try:
        failed = library.nvcompGetProperties(byref(properties))
    except AttributeError as error:
        raise CodecError(f"{path} is no nvCOMP of version {MAJOR}: {error}; {_INSTALL}") from error
    major, rest = divmod(properties.version, 1000)
    version = f"{major}.{rest // 100}.{rest % 100}"
    if failed or major != MAJOR:
        raise CodecError(f"{path} is nvCOMP {version} and version {MAJOR} is needed: {_INSTALL}")
    return version


def _find_in_package() -> str:
    """The library's path in NVIDIA's package, which is not imported. Raises CodecError where it is missing."""
    folders = _package_folders()
    for folder in folders:
        for part in ("lib64", "lib", "bin"):
            path = os.path.join(folder, part, LIBRARY)
            if os.path.isfile(path):
                return path
    others = sorted(path for folder in folders for path in glob.glob(os.path.join(folder, "lib*", "libnvcomp.so.*")))
    if others:
        raise CodecError(
            f"nvCOMP {others[-1].rpartition('.so.')[2]} is installed and version {MAJOR} is needed: {_INSTALL}"
        )
    raise CodecError(f"nvCOMP is not installed, which decodes on the GPU: {_INSTALL}")


def _package_folders() -> list[str]:
    from importlib.util import find_spec

    try:
        spec = find_spec("nvidia.libnvcomp")
    except ModuleNotFoundError:  # nothing of NVIDIA's is there
        return []
    return list(spec.submodule_search_locations or ()) if spec is not None else []


def is_installed() -> bool:
    """Whether ``Nvcomp.load`` would find a library, as far as a look at files can tell: loading it takes longer."""
    folders = filter(None, (read_variable("LD_LIBRARY_PATH") or "").split(":"))
    if any(os.path.exists(os.path.join(folder, LIBRARY)) for folder in folders):
        return True
    try:
        return bool(_find_in_package())
    except CodecError:
        return False
