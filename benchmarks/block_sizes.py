"""What short blocks of ``planes+zstd`` cost a processor: chunks of a GPU are written in them, so that nvCOMP has many frames.

    python -m benchmarks.block_sizes [--rounds 31]

One chunk of 16 MiB of bf16 as trained weights have them (Gaussian, seeded), in blocks of either size, decoded on one core in
turns. Processor time, medians, and the ratio pair by pair.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import numpy as np

from coldstart.codecs import DEVICE_BLOCK_BYTES
from coldstart.codecs.planes import BLOCK_BYTES, PlanesCodec

CHUNK_BYTES = 16 << 20
ITEM_BYTES = 2


def main() -> None:
    """Measure, and print a line for each size and one for the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    rounds = parser.parse_args().rounds
    drawn = np.random.default_rng(0).normal(0, 0.02, CHUNK_BYTES // ITEM_BYTES).astype("<f4")
    raw = memoryview((drawn.view("<u4") >> 16).astype("<u2").tobytes())
    target = memoryview(bytearray(CHUNK_BYTES))
    codecs = {size: PlanesCodec(block_bytes=size) for size in (DEVICE_BLOCK_BYTES, BLOCK_BYTES)}
    stored = {size: codec.encode(raw, item_bytes=ITEM_BYTES) for size, codec in codecs.items()}
    seconds: dict[int, list[float]] = {size: [] for size in codecs}
    for _ in range(rounds):
        for size, codec in codecs.items():
            data, parameters = stored[size]
            began = time.process_time()
            codec.decode(memoryview(data), target, item_bytes=ITEM_BYTES, parameters=parameters)
            seconds[size].append(time.process_time() - began)
            assert target == raw
    for size in codecs:
        rate, ratio = CHUNK_BYTES / median(seconds[size]) / 1e9, CHUNK_BYTES / len(stored[size][0])
        print(f"{size >> 10:4d} KiB  {rate:.2f} GB/s  ratio {ratio:.4f}")
    pairs = [one / other for one, other in zip(*(seconds[size] for size in codecs), strict=True)]
    print(
        f"{DEVICE_BLOCK_BYTES >> 10} over {BLOCK_BYTES >> 10} KiB: {median(pairs):.2f} ({min(pairs):.2f} to {max(pairs):.2f})"
    )


if __name__ == "__main__":
    main()
