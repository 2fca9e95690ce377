"""The process that imports a handler's file and says what that costs. It imports next to nothing before.

    python -c "from coldstart.imports.child import main; main()" PATH MODULE-NAME < SOURCE

Prints lines of tab-separated words: ``L`` and the line of the file and the seconds of an import that the file asked for,
``T`` and the seconds of all, and ``E``, the line and the error where the import failed. What the file itself prints goes to
standard error.
"""

from __future__ import annotations

import os
import sys
import time

from coldstart.imports.watch import ImportWatch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType


def main() -> None:
    """Import what the command line names."""
    path, name = sys.argv[1:]
    sys.argv[1:] = []
    source = sys.stdin.buffer.read()
    told = os.dup(1)
    os.dup2(2, 1)
    lines = _import(path, name, source)
    os.write(told, "".join(f"{line}\n" for line in lines).encode())
    sys.stdout.flush()
    os._exit(0)  # threads and exit handlers of what was imported are nobody's business here


def _import(path: str, name: str, source: bytes) -> list[str]:
    sys.path.insert(0, path.rpartition("/")[0])
    code = compile(source, path, "exec", dont_inherit=True)
    if name in sys.modules:
        name = f"_coldstart_handler_{name}"
    module = type(sys)(name)
    module.__file__ = path
    sys.modules[name] = module
    watch = ImportWatch().begin()
    try:
        exec(code, module.__dict__)  # noqa: S102  what the import statement does
    except BaseException as error:  # noqa: BLE001  the process' edge: whatever it is, the parent tells it
        words = f"{type(error).__name__}: {error}".split()
        return [f"E\t{_line(error.__traceback__, path)}\t{' '.join(words)}"]
    ended = time.monotonic()
    loads = [f"L\t{load.line}\t{load.seconds:.6f}" for load in watch.loads if load.importer == name]
    return [*loads, f"T\t{ended - watch.began_seconds:.6f}"]


def _line(trace: TracebackType | None, path: str) -> int:
    """The last line of the file that the error came through."""
    line = 0
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == path:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line
