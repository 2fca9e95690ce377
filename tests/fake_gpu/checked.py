"""Runs every kernel at every alignment, for a library whose accesses are checked: ``python -m tests.fake_gpu.checked LIBRARY``."""

from __future__ import annotations

import sys

from blake3 import blake3

from tests.fake_gpu.emulated import Emulation, interleaved, planes_of, random_bytes, shifted


def main(library: str) -> None:
    """Ends with status 0 and a line once everything came out right; an access outside of memory ends the process before."""
    emulated = Emulation(library)
    for item_bytes in (1, 2, 3, 4, 8):
        planes = planes_of(item_bytes, 203)
        for target_shift in range(9):
            for block_shift in range(16):
                merged = emulated.merged(planes, 71, target_shift=target_shift, block_shift=block_shift)
                assert merged == interleaved(planes)
    for length in (0, 1, 17, 63, 64, 65, 1023, 1024, 1025, 3000, 9 * 1024 + 5, 300_001):
        for shift in (0, 1, 4, 15):
            data = shifted(random_bytes(length), shift)
            assert emulated.digest(data) == blake3(data).digest()
    print("checked")


main(sys.argv[1])
