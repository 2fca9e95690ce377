"""What coldstart relies on in cupy, for the fake on the fake driver and for the real one on a GPU alike.

Two things are relied on: that an array can be made over memory that is somebody else's, and that it says where its own is.
What handlers of the tests compute (``@``, ``sum``) is asked for too.
"""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from coldstart.devices.cuda_memory import DeviceMemory, copy_out
from coldstart.devices.device_bytes import DeviceBytes
from coldstart.frameworks import cupy as for_cupy
from coldstart.manifest import Leaf

if TYPE_CHECKING:
    from coldstart.devices.cuda_driver import Gpu

NUMBERS = np.arange(24, dtype=np.float32).reshape(4, 6)
DTYPES = ("|b1", "|i1", "|u1", "<u2", "<f2", "<f4", "<i8", "<f8", "<c8")


def leaf_of(dtype: str, shape: tuple[int, ...], strides: tuple[int, ...], *, offset_bytes: int = 0) -> Leaf:
    """A leaf of cupy in buffer 0."""
    item_bytes = np.dtype(dtype).itemsize
    return Leaf("x", "cupy", "", dtype, item_bytes, shape, strides, 0, offset_bytes, requires_grad=False, same_as="")


def over(memory: DeviceMemory) -> DeviceBytes:
    """All of an allocation, as an arena gives it."""
    return DeviceBytes(memory.address, memory.length_bytes, memory.gpu.ordinal, memory)


class CupyContract:
    """Give the fixtures ``cupy``, the module, and ``gpu``, the GPU of number 0 that it works on."""

    def test_arrays_are_told_by_their_class(self, cupy: Any):
        """The class is ``cupy.ndarray``, and one of its bases, or itself, is known by that name."""
        cls = type(cupy.zeros(3))
        assert cls is cupy.ndarray
        assert (cls.__module__, cls.__qualname__) == ("cupy", "ndarray")
        assert for_cupy.is_array({(each.__module__, each.__qualname__) for each in cls.__mro__})
        assert for_cupy.refusal(cupy.zeros(3)) == ""

    def test_arrays_have_no_attributes_of_their_own(self, cupy: Any):
        """Nothing of a user's hangs on one, which a restore would lose; something may refer to it weakly."""
        array = cupy.zeros(3)
        assert not hasattr(array, "__dict__")
        with pytest.raises(AttributeError):
            array.note = 1
        assert weakref.ref(array)() is array

    def test_arrays_say_what_they_are(self, cupy: Any, gpu: Gpu):
        """Shape, strides in bytes, dtype of numpy, bytes, address of the first item and of the allocation, and the device."""
        array = cupy.asarray(NUMBERS)
        assert (array.shape, array.strides, array.size, array.nbytes) == ((4, 6), (24, 4), 24, 96)
        assert (array.dtype, array.dtype.str, array.dtype.kind) == (np.dtype("<f4"), "<f4", "f")
        assert array.data.ptr >= array.data.mem.ptr
        assert array.device.id == gpu.ordinal == 0
        assert array.get().tobytes() == copy_out(gpu, int(array.data.ptr), 96) == NUMBERS.tobytes()
        form, extent = for_cupy.form(array), for_cupy.extent(array, 96)
        assert (form.dtype, form.item_bytes, form.shape, form.strides) == ("<f4", 4, (4, 6), (6, 1))
        assert (extent.address, extent.end - extent.address, extent.gpu) == (array.data.ptr, 96, 0)

    def test_views_share_their_allocation(self, cupy: Any):
        """A part begins behind its whole, and both name the same allocation."""
        array = cupy.asarray(NUMBERS)
        part = array[1:, ::2]
        assert (part.shape, part.strides) == ((3, 3), (24, 8))
        assert part.data.ptr == array.data.ptr + 24
        assert part.data.mem.ptr == array.data.mem.ptr
        part[...] = 0
        expected = NUMBERS.copy()
        expected[1:, ::2] = 0
        assert array.get().tobytes() == expected.tobytes()

    def test_arrays_show_themselves_to_others(self, cupy: Any):
        """By ``__cuda_array_interface__``: torch and we read them so."""
        array = cupy.asarray(NUMBERS)
        shown = array.__cuda_array_interface__
        assert tuple(shown["shape"]) == (4, 6)
        assert (shown["typestr"], tuple(shown["data"])) == ("<f4", (array.data.ptr, False))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_an_array_is_made_over_the_memory_of_an_arena(self, cupy: Any, gpu: Gpu, dtype: str):
        """Of any dtype of plain numbers, at an offset, with steps: what it is given is written to that memory."""
        item_bytes = np.dtype(dtype).itemsize
        memory = DeviceMemory(gpu, 4096)
        array = for_cupy.view(leaf_of(dtype, (3, 2), (5, 2), offset_bytes=8 * item_bytes), over(memory))
        assert (array.shape, array.strides) == ((3, 2), (5 * item_bytes, 2 * item_bytes))
        assert array.dtype == np.dtype(dtype)
        assert array.data.ptr == memory.address + 8 * item_bytes
        values = np.arange(1, 7).reshape(3, 2).astype(dtype)
        array[...] = cupy.asarray(values)
        assert array.get().tobytes() == values.tobytes()
        written = np.frombuffer(copy_out(gpu, memory.address, 4096), dtype)
        assert written[8] == values[0, 0]
        assert written[8 + 5 * 2 + 2] == values[2, 1]

    def test_an_array_keeps_the_memory_that_it_is_made_over(self, cupy: Any, gpu: Gpu):
        """As long as it or a view of it lives, so does what owns the memory, and no longer."""
        memory = DeviceMemory(gpu, 4096)
        owner = weakref.ref(memory)
        array = for_cupy.view(leaf_of("<f4", (8,), (1,)), over(memory))
        part = array[4:]
        del memory, array
        gc.collect()
        assert owner() is not None
        part[...] = 3
        assert part.get().tolist() == [3.0] * 4
        del part
        gc.collect()
        assert owner() is None

    def test_arrays_without_items(self, cupy: Any, gpu: Gpu):
        """Of any shape with a zero in it, over memory or not."""
        for shape in ((0,), (2, 0), (0, 3)):
            array = for_cupy.view(leaf_of("<f4", shape, (1,) * len(shape)), None)
            assert (array.shape, array.size, array.nbytes) == (shape, 0, 0)
            assert array.get().shape == shape
        assert for_cupy.view(leaf_of("|u1", (0,), (1,)), over(DeviceMemory(gpu, 1))).size == 0

    def test_an_array_without_dimensions(self, cupy: Any, gpu: Gpu):
        """One number is an array too."""
        array = for_cupy.view(leaf_of("<f8", (), ()), over(DeviceMemory(gpu, 64)))
        array[...] = 2.5
        assert float(array.get()) == 2.5

    def test_dtypes_are_those_of_numpy(self, cupy: Any):
        """A name that is none is an error of the kind that numpy raises."""
        assert cupy.dtype("<f2") == np.dtype("<f2")
        for name in ("<x4", "hello"):
            with pytest.raises((TypeError, ValueError)):
                cupy.dtype(name)

    def test_arrays_compute(self, cupy: Any):
        """Products and sums of arrays are arrays, and fresh ones are zero where that is asked for."""
        array = cupy.asarray(NUMBERS)
        assert (array @ cupy.asarray(NUMBERS.T.copy())).get().tolist() == (NUMBERS @ NUMBERS.T).tolist()
        assert float(array.sum().get()) == 276.0
        assert cupy.zeros((2, 3), "<f4").get().tolist() == [[0.0] * 3] * 2
        assert cupy.empty((2, 3), "<u2").nbytes == 12
        assert cupy.asarray([1, 2], "<u2").dtype == np.dtype("<u2")
        assert isinstance(cupy.__version__, str)


__all__ = ["CupyContract", "leaf_of", "over"]
