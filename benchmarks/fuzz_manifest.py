"""The readers of manifests and refs against bytes that somebody altered, for as long as one likes.

    python benchmarks/fuzz_manifest.py [--seconds N] [--seed N]

Documents that are right are altered again and again: bytes flipped, cut, doubled and inserted, values replaced by hostile ones,
fields removed, repeated, exchanged and nested. Whatever comes of it, a reader either raises ManifestError, or gives a manifest
that is written and read back as itself; it never takes longer than a second, and its memory stays within a bound. A failure
prints the seed and the bytes, in hex, and ends with status 1. The default suite has a short version of this.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parent.parent))

from coldstart.errors import ManifestError
from coldstart.manifest import manifest_from_json, manifest_to_json, ref_from_json, ref_to_json
from coldstart.plan import fetch_order
from tests.test_manifest import EMPTY, MANIFEST, REF

MOST_SECONDS = 1.0
MOST_GROWN_KIB = 256 << 10
HOSTILE = (
    *(None, True, False, "", "\0", "../x", "/etc/passwd", "\ud800", "x" * 5000, "e\u0301", 0, -1, 1.5, 1e308, -0.0),
    *(1 << 31, 1 << 52, 1 << 53, 1 << 63, -(1 << 63), 10**40, [], {}, [[]], {"": {}}, [None], [0] * 100, "NaN"),
)


def altered_value(random: Random, value: object, depth: int = 0) -> object:
    """The value with one place in it changed."""
    if isinstance(value, dict) and value and (depth == 0 or random.random() < 0.8):
        key = random.choice(sorted(value))
        changed = dict(value)
        action = random.random()
        if action < 0.1:
            del changed[key]
        elif action < 0.2:
            changed[random.choice(("extra", key + "x", "format", "chunks", ""))] = value[key]
        elif action < 0.3:
            other = random.choice(sorted(value))
            changed[key], changed[other] = value[other], value[key]
        else:
            changed[key] = altered_value(random, value[key], depth + 1)
        return changed
    if isinstance(value, list) and value and random.random() < 0.8:
        place = random.randrange(len(value))
        action = random.random()
        if action < 0.1:
            return value[:place] + value[place + 1 :]
        if action < 0.2:
            return [*value[:place], value[place], *value[place:]]
        if action < 0.25:
            return value * random.choice((2, 100))
        if action < 0.35:
            other = random.randrange(len(value))
            changed_list = list(value)
            changed_list[place], changed_list[other] = value[other], value[place]
            return changed_list
        return [*value[:place], altered_value(random, value[place], depth + 1), *value[place + 1 :]]
    if isinstance(value, int) and random.random() < 0.5:
        return value + random.choice((-1, 1, 256, -256, 1 << random.randrange(64)))
    if random.random() < 0.05:
        return [value]
    return random.choice(HOSTILE)


def altered_bytes(random: Random, data: bytes) -> bytes:
    """The bytes with a place in them changed."""
    place = random.randrange(len(data) + 1)
    action = random.random()
    if action < 0.3 and place < len(data):
        return data[:place] + bytes([data[place] ^ (1 << random.randrange(8))]) + data[place + 1 :]
    if action < 0.5:
        return data[:place] + random.randbytes(random.randrange(1, 20)) + data[place:]
    if action < 0.7:
        return data[:place] + data[place + random.randrange(1, 50) :]
    if action < 0.8:
        return data[:place]
    if action < 0.9:
        return data[:place] + random.choice(
            (b"[" * 50_000, b"9" * 5000, b'{"a":' * 50_000, b"NaN", b"1e999", b"\\ud800")
        )
    return data[:place] + data[random.randrange(len(data) + 1) :]


def specimen(random: Random) -> tuple[str, bytes]:
    """Altered bytes of one kind of document."""
    kind, base = random.choice((("manifest", MANIFEST), ("manifest", EMPTY), ("ref", REF)))
    data = manifest_to_json(base) if kind == "manifest" else ref_to_json(base)
    for _ in range(random.choice((1, 1, 1, 2, 3, 8))):
        if random.random() < 0.6:
            try:
                data = json.dumps(altered_value(random, json.loads(data))).encode("utf-8", "surrogatepass")
            except (ValueError, RecursionError):
                data = altered_bytes(random, data)
        else:
            data = altered_bytes(random, data)
    return kind, data


def accepted(kind: str, data: bytes) -> bool:
    """Whether the reader takes it; raises AssertionError if it takes what it should not."""
    try:
        if kind == "ref":
            ref = ref_from_json(data)
            assert ref_from_json(ref_to_json(ref)) == ref
        else:
            manifest = manifest_from_json(data)
            assert manifest_from_json(manifest_to_json(manifest)) == manifest
            assert sorted(fetch_order(manifest)) == list(range(len(manifest.chunks)))
            assert sum(chunk.length_bytes for chunk in manifest.chunks) == manifest.raw_bytes
    except ManifestError:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz the readers of manifests and refs.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    ends = time.monotonic() + options.seconds
    seed, taken, slowest, before_kib = options.seed, 0, 0.0, 0
    while time.monotonic() < ends:
        kind, data = specimen(Random(seed))
        began = time.process_time()
        try:
            taken += accepted(kind, data)
        except BaseException as error:
            print(f"seed {seed}: {kind}: {type(error).__name__}: {error}\n{data[:20_000].hex()}")
            return 1
        slowest = max(slowest, time.process_time() - began)
        if seed == options.seed + 1000:
            before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seed += 1
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib if before_kib else 0
    count = seed - options.seed
    print(
        f"{count} documents, {taken} taken, slowest {1000 * slowest:.0f} ms of a processor, memory grew by {grown_kib} KiB"
    )
    return 1 if slowest > MOST_SECONDS or grown_kib > MOST_GROWN_KIB else 0


if __name__ == "__main__":
    sys.exit(main())
