"""Where the processor time of a verified restore goes: a sampling profile of the fetcher process, by what its code does.

    python -m benchmarks.restore_profile [--gib 1] [--rounds 3] [--output FILE.md]

Each round restores a snapshot of raw chunks from nginx on this machine (as ``benchmarks.restore`` does, model and snapshots are
the same files) in a fresh process under ``perf record``, which looks 1,999 times a second of processor time at what each process
of it runs, down through the kernel. A sample counts to the innermost thing that the table names. The fetcher's samples before
its first look at a socket with data are its start. Shares, not seconds: the machine may be busy with other things.

It needs nginx (``apt-get install nginx-light``), Debian's linux-perf, root, and coldstart's demo extra.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.restore import RESULTS, machine_name
from benchmarks.restoring.contenders import CONTENDERS, OURS, task_of, variables_of
from benchmarks.restoring.place import prepared
from benchmarks.restoring.server import ObjectServer
from benchmarks.restoring.trial import run_trial
from coldstart.bench.machine import describe_machine
from coldstart.config import user_cache_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from benchmarks.restoring.place import Place

SAMPLES_PER_SECOND = 1999
KERNEL = "[kernel.kallsyms]"

START = "its start: interpreter, imports, connecting"
BLAKE3 = "BLAKE3"
FAULTS = "memory: page faults"
PWRITE_PAGES = "memory: pages of the shared memory file, allocated by pwrite"
PWRITE_COPY = "pwrite: the copy into the memory file, and the call"
RECEIVE_COPY = "recv: the copy out of the socket"
RECEIVE_CALL = "recv: the call, and freeing what was read"
PROTOCOL = "TCP: taking in and acknowledging packets"
WAITING = "waiting: locks, switches, timers"
UNMAP = "memory: other mapping and unmapping"
KERNEL_REST = "the rest of the kernel"
COPY = "copies in user space"
SIGNING = "libcrypto: signing the requests"
PYTHON = "Python"
REST = "other libraries"

_KERNEL_RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (PROTOCOL, ("net_rx_action", "tcp_v4_rcv", "__tcp_cleanup_rbuf", "tcp_cleanup_rbuf", "tcp_send_ack", "ip_output")),
    (FAULTS, ("do_user_addr_fault", "handle_mm_fault", "exc_page_fault", "asm_exc_page_fault")),
    (PWRITE_COPY, ("ksys_pwrite64", "__x64_sys_pwrite64", "vfs_write")),
    (RECEIVE_COPY, ("_copy_to_iter", "skb_copy_datagram_iter", "__skb_datagram_iter", "simple_copy_to_iter")),
    (RECEIVE_CALL, ("__sys_recvfrom", "__x64_sys_recvfrom", "tcp_recvmsg", "sock_recvmsg")),
    (UNMAP, ("__x64_sys_munmap", "__x64_sys_mmap", "__x64_sys_madvise", "exit_mmap", "do_exit", "__x64_sys_mprotect")),
    (
        WAITING,
        ("__x64_sys_futex", "schedule", "__schedule", "__x64_sys_poll", "__x64_sys_epoll_wait", "__x64_sys_select"),
    ),
)
_NEW_PAGES = frozenset({"shmem_get_folio_gfp", "shmem_alloc_and_add_folio", "shmem_write_begin"})
_LIBRARY_RULES = (
    (BLAKE3, ("blake3",)),
    (SIGNING, ("libssl", "libcrypto", "_ssl", "_hashlib")),
    (COPY, ("libc.so", "libc-2")),
    (PYTHON, ("python",)),
)
_RECEIVING = frozenset({"tcp_recvmsg", "__sys_recvfrom"})


class Sample(NamedTuple):
    """One look: the process, when (seconds), and what it ran, innermost first, as (symbol, file)."""

    pid: int
    at: float
    frames: tuple[tuple[str, str], ...]


def category_of(sample: Sample) -> str:
    """What the code does that the sample fell on: the innermost frame that a rule names."""
    is_new_page = any(symbol in _NEW_PAGES for symbol, _ in sample.frames)
    for symbol, file in sample.frames:
        if KERNEL not in file:
            return _category_of_library(file)
        for category, symbols in _KERNEL_RULES:
            if symbol in symbols:
                return PWRITE_PAGES if category == PWRITE_COPY and is_new_page else category
    return KERNEL_REST


def _category_of_library(file: str) -> str:
    name = file.rsplit("/", 1)[-1]
    found = next((category for category, parts in _LIBRARY_RULES if any(part in name for part in parts)), REST)
    return PYTHON if found == REST and "/lib-dynload/" in file else found


def read_samples(data: Path) -> Iterator[Sample]:
    """The samples of a recording."""
    command = ["perf", "script", "-i", str(data), "--no-inline", "-F", "pid,time,ip,sym,dso"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for block in text.split("\n\n"):
        head, *lines = block.strip().splitlines() or [""]
        if head:
            pid, at = head.split()[:2]
            yield Sample(int(pid.split("/")[0]), float(at.rstrip(":")), tuple(_frame(line) for line in lines))


def _frame(line: str) -> tuple[str, str]:
    _, _, rest = line.strip().partition(" ")
    symbol, _, file = rest.rpartition(" (")
    return symbol.split("+", 1)[0], file.rstrip(")")


def shares_of(samples: Sequence[Sample]) -> tuple[Counter[str], Counter[str]]:
    """Samples by category: of the fetcher, and of the process that it fetches for while it lives."""
    by_process: dict[int, list[Sample]] = {}
    for sample in samples:
        by_process.setdefault(sample.pid, []).append(sample)
    reader = samples[0].pid
    fetcher = max((pid for pid in by_process if pid != reader), key=lambda pid: len(by_process[pid]))
    own = sorted(by_process[fetcher], key=lambda sample: sample.at)
    data = next(sample.at for sample in own if any(symbol in _RECEIVING for symbol, _ in sample.frames))
    fetched = Counter(START if sample.at < data else category_of(sample) for sample in own)
    beside = [sample for sample in by_process[reader] if own[0].at <= sample.at <= own[-1].at]
    return fetched, Counter(map(category_of, beside))


def profile(place: Place, server: ObjectServer, folder: Path) -> list[Sample]:
    """One verified restore under perf; its tensors are compared with the model's. Raises RuntimeError."""
    contender = next(each for each in CONTENDERS if each.name == OURS)
    data = folder / "perf.data"
    within = ("perf", "record", "-q", "-e", "cpu-clock", "-F", str(SAMPLES_PER_SECOND), "-g", "-o", str(data), "--")
    trial = run_trial(
        Path(sys.executable),
        contender.reader,
        task_of(contender, place, server),
        variables_of(contender, place, server),
        place.digests(),
        within=within,
    )
    if trial.wrong:
        raise RuntimeError(f"wrong tensors: {trial.wrong}")
    print(f"  {trial.seconds:.3f} s, {trial.details}", flush=True)
    return list(read_samples(data))


def to_markdown(rounds: Sequence[tuple[Counter[str], Counter[str]]], size_bytes: int, command: str) -> str:
    """The table."""
    fetchers, readers = [fetched for fetched, _ in rounds], [beside for _, beside in rounds]
    method = (
        f"{size_bytes >> 20:,} MiB of raw chunks from nginx over plain loopback, one fetcher process; {len(rounds)} restores,"
        f" each in fresh processes and compared with the model by hash. Made by `{command}` (perf, cpu-clock,"
        f" {SAMPLES_PER_SECOND} samples a second). Shares, not seconds: others used the machine."
    )
    beside_share = median(sum(beside.values()) / sum(fetched.values()) for fetched, beside in rounds)
    counts = ", ".join(str(sum(each.values())) for each in fetchers)
    between = (
        f"Samples of the fetcher: {counts}. While it lives, the process that it fetches for takes {beside_share:.0%} of its"
        " samples more:"
    )
    head = ("| median of its samples | rounds |", "| --- | --- | --- |")
    lines = [
        "# Where the processor time of a verified restore goes",
        "",
        f"Machine: {describe_machine()}.",
        "",
        method,
        "",
    ]
    lines += [f"| what the fetcher does {head[0]}", head[1], *_rows(fetchers), "", between, ""]
    lines += [f"| what that process does {head[0]}", head[1], *_rows(readers)]
    return "\n".join(lines) + "\n"


def _rows(rounds: Sequence[Mapping[str, int]]) -> list[str]:
    shares = {
        name: [each.get(name, 0) / max(1, sum(each.values())) for each in rounds]
        for name in dict.fromkeys(name for each in rounds for name in each)
    }
    ordered = sorted(shares.items(), key=lambda item: -median(item[1]))
    return [
        f"| {name} | {median(its):.1%} | {', '.join(f'{share:.1%}' for share in its)} |"
        for name, its in ordered
        if max(its) >= 0.002
    ]


def main() -> None:
    """Run, and write what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, default=None, help="by default restore-profile-MACHINE.md in the results"
    )
    options = parser.parse_args()
    cache, size_bytes = Path(user_cache_folder()) / "coldstart-benchmarks", int(options.gib * (1 << 30))
    place = prepared(cache, Path(sys.executable), size_bytes, options.seed)
    with ObjectServer(place.root, place.folder / "nginx") as server, tempfile.TemporaryDirectory() as folder:
        profile(place, server, Path(folder))  # warms the disk caches, not counted
        rounds = [profile(place, server, Path(folder)) for _ in range(options.rounds)]
    text = to_markdown([shares_of(samples) for samples in rounds], size_bytes, "python -m benchmarks.restore_profile")
    output = options.output or RESULTS / f"restore-profile-{machine_name(describe_machine().label)}.md"
    output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
