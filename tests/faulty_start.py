"""coldstart's command line in a process in which something is out of order, and in whose fetchers it is too.

``python -m tests.faulty_start run handler.py --json``; the variable FAULTS says what: see ``Faults``.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from typing import Any, NamedTuple

VARIABLE = "FAULTS"
_FETCHERS_ONLY = """
import sys
sys.path[:] = {{path!r}}
if {{module!r}} == "coldstart.fetch.child":
    {fault}
from {{module}} import main
main()
"""
FETCHER = "from coldstart.fetch.child import main"
SPOILT = f"from tests.faulty_start import spoil; spoil(is_fetcher=True); {FETCHER}"


class Faults(NamedTuple):
    """What is out of order. Everything holds for the worker and its fetchers, but for the first two."""

    dead_fetchers: bool = False
    """A fetcher is killed before its first word."""
    killed_at_read: int = 0
    """A fetcher is killed when it begins its read of this number, from 1, from a folder. 0: none is."""
    bytes_per_fetcher: int = 0
    patience: float = 1.0
    """The time limits of reads, hedges and retries are those of the product times this."""
    no_memory_files: bool = False
    data_bytes: int = 0
    """RLIMIT_DATA, over what the process has when it begins; 0: none."""
    stalled_seconds: float = 0.0
    """``restore.STALLED_SECONDS`` instead of the product's; 0: that."""
    control_group_bytes: int = 0
    """Memory that the process' control group allows; 0: no such group."""

    def environment(self) -> dict[str, str]:
        """The variable that tells a process of them."""
        return {VARIABLE: json.dumps(self._asdict())}


def main() -> int:
    """Spoil this process, and run the command."""
    spoil(is_fetcher=False)
    from coldstart.cli import main as command

    return command()


def spoil(*, is_fetcher: bool) -> None:
    """Put out of order what FAULTS says."""
    faults = Faults(**json.loads(os.environ[VARIABLE]))
    if is_fetcher and faults.dead_fetchers:
        os.kill(os.getpid(), signal.SIGKILL)
    _shorten(faults.patience)
    if faults.bytes_per_fetcher:
        from coldstart.fetch import crew

        crew.BYTES_PER_FETCHER = faults.bytes_per_fetcher
    if faults.stalled_seconds:
        from coldstart import restore

        restore.STALLED_SECONDS = faults.stalled_seconds
    if faults.no_memory_files:
        os.memfd_create = _refuse
    if faults.control_group_bytes:
        _limit_group(faults.control_group_bytes)
    if is_fetcher and faults.killed_at_read:
        _die_at_read(faults.killed_at_read)
    if not is_fetcher:
        _spoil_fetchers()
    if faults.data_bytes:
        if not is_fetcher:
            import numpy  # noqa: F401, ICN001  which wants much more than it needs

        _limit_data(faults.data_bytes)


def _spoil_fetchers() -> None:
    spawn = os.posix_spawn

    def spoilt(path: str, arguments: list[str], *rest: Any, **options: Any) -> int:
        return spawn(path, [text.replace(FETCHER, SPOILT) for text in arguments], *rest, **options)

    os.posix_spawn = spoilt  # type: ignore[assignment]


def _shorten(patience: float) -> None:
    """Before anybody has taken the defaults."""
    from coldstart.stores import hedging, http1_answer, retrying

    for kind in (http1_answer.Limits, retrying.RetryPolicy, hedging.HedgePolicy):
        usual = kind._field_defaults
        shortened = {name: usual[name] * patience for name in usual if name.endswith("_seconds")}
        kind.__new__.__defaults__ = tuple({**usual, **shortened}.values())  # type: ignore[attr-defined]
    retrying.RetryingStore.__init__.__defaults__ = (retrying.RetryPolicy(),)  # type: ignore[misc]
    assert "coldstart.stores.s3_reader" not in sys.modules


def _refuse(*_: Any) -> int:
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


def _limit_group(limit_bytes: int) -> None:
    from coldstart.devices import cpu

    group = "/sys/fs/cgroup/worker"
    files = {
        "/proc/self/cgroup": "0::/worker\n",
        f"{group}/memory.max": f"{limit_bytes}\n",
        f"{group}/memory.current": "0\n",
        f"{group}/memory.stat": "inactive_file 0\nactive_file 0\n",
    }
    read = cpu._read_text
    cpu._read_text = lambda path: files[path] if path in files else read(path)


def _limit_data(room_bytes: int) -> None:
    import resource

    with open("/proc/self/status") as status:
        (used_bytes,) = (int(line.split()[1]) << 10 for line in status if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (used_bytes + room_bytes, resource.RLIM_INFINITY))


def _die_at_read(number: int) -> None:
    from coldstart.stores.local import LocalStore

    read_into, reads = LocalStore.read_into, iter(range(1, number))

    def counted(self: LocalStore, *arguments: Any, **options: Any) -> None:
        if next(reads, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        read_into(self, *arguments, **options)

    LocalStore.read_into = counted  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(main())
