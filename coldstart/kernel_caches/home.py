"""The private folder that the libraries of this process keep their kernels in, and what a start may take from a snapshot.

Variables are one a process, so there is one folder for it: that of the handler whose start was first. A second handler of the
process shares it, and both snapshots hold the kernels of both, stored once.

::

    <files folder>/<handler>/kernels/<platform>-<key>/inductor/ triton/ cupy/ driver/

The path says nothing of this machine or process: some entries hold paths, and it is best that they are the same elsewhere.
Workers of a host share the folder; the libraries write to it as they do to their own.

A variable that the user has set is the user's: that cache is neither restored nor captured. What lies below the folder of
restored files was set by a parent of this process (a worker that proves its generation) and counts as not set.
"""

from __future__ import annotations

import os
import sys
import threading
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.config import read_variable, set_variables
from coldstart.errors import ProgramRuntimeError
from coldstart.kernel_caches.compiler import takes_all_instructions
from coldstart.kernel_caches.kinds import COMPILER_SWITCH, DRIVER, INDUCTOR, KINDS, SWITCHES, TRITON, names_in
from coldstart.kernel_caches.platform import library_versions, platform_of, root_of
from coldstart.signing import are_required
from coldstart.stores import folder_of
from coldstart.trust import distrust, weakness_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from coldstart.config import Settings
    from coldstart.devices.base import Device

_KEY_DIGITS = 16
_LATE = (
    ("torch._inductor.config", "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"),
    ("cupy", "CUDA_CACHE_PATH"),
)
"""Modules that have read a variable, or let the driver do so, once they are imported."""


class Home(NamedTuple):
    """One process' folder. ``kinds``: those whose variables are ours. ``late``: what was read before the start could set it.

    ``obstacle``: why no variable was set, "" if one was.
    """

    folder: str
    kinds: tuple[str, ...]
    late: str
    obstacle: str


class Kernels(NamedTuple):
    """What one start has to do with kernel caches. ``root`` is this platform's, ``facts`` what it is made of.

    ``obstacle``: why nothing is restored or captured, "" if nothing stands in the way; ``distrust``: why nothing of this store
    is executed, and ``capture_distrust`` why nothing would be that is captured into it. ``late``: what libraries had read
    before the start. ``before``: what lay in the folder then.
    """

    folder: str
    root: str
    facts: Mapping[str, str]
    kinds: tuple[str, ...]
    obstacle: str
    distrust: str
    capture_distrust: Callable[[], str]
    late: str
    before: frozenset[str]

    @property
    def wanted(self) -> str:
        """The root, and consumer, of what is to be fetched; "" for nothing."""
        return "" if self.obstacle or self.distrust else self.root


class _Process:
    """What this process has set, so that it can be taken back."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.home: Home | None = None
        self.before: dict[str, str | None] = {}


_process = _Process()


def set_up(settings: Settings, device: Device, name: str, key_digest: str, *, proves: bool) -> Kernels | None:
    """Point the libraries' variables into the private folder, unless that was done; what the start is to know of it.

    ``name``: the snapshot's. ``proves``: this process proves a generation, so that nothing of its worker's is to be found.
    None: there is nothing to keep, or it is switched off. Never raises: what goes wrong is the ``obstacle``.
    """
    if not settings.kernel_caches:
        return None
    versions = library_versions()
    if not versions:
        return None
    try:
        facts = platform_of(device, versions)
    except ProgramRuntimeError as error:
        return _without(str(error))
    root = root_of(facts)
    handler = name.partition("=")[0]
    folder = f"{settings.files_folder}/{handler}/kernels/{root.rpartition('_')[2]}-{key_digest[:_KEY_DIGITS]}"
    own = f"{folder}.proof-{os.getppid()}" if proves else folder
    home = _home(settings, own, facts["processor"], anew=proves)
    if home.obstacle:
        return _without(home.obstacle)
    before = frozenset(names_in(home.folder, home.kinds))
    return Kernels(
        home.folder,
        root,
        facts,
        home.kinds,
        "",
        _distrust(settings, name),
        partial(_capture_distrust, settings, name),
        home.late,
        before,
    )


def proof_folder(folder: str) -> str:
    """Where a child of this process keeps its kernels while it proves a generation."""
    return f"{folder}.proof-{os.getpid()}"


def give_up(reason: str) -> None:
    """Remove what lies in the folder, and neither restore nor capture any more: the start could not go on with it.

    The libraries go on writing there. Other workers of the host compile what they look for and do not find.
    """
    import shutil

    with _process.lock:
        home = _process.home
        if home is None or home.obstacle:
            return
        for kind in home.kinds:
            shutil.rmtree(f"{home.folder}/{kind}", ignore_errors=True)
        _process.home = home._replace(obstacle=reason)


def forget() -> None:
    """Take back what was set. For tests, which start many handlers in one process."""
    with _process.lock:
        set_variables(_process.before)
        _process.home, _process.before = None, {}


def _without(obstacle: str) -> Kernels:
    return Kernels("", "", {}, (), obstacle, "", str, "", frozenset())


def _distrust(settings: Settings, name: str) -> str:
    return distrust(settings.store, trust_store=settings.trust_store, is_signed=are_required(settings), snapshot=name)


def _capture_distrust(settings: Settings, name: str) -> str:
    """A folder that is not there is made by the capture, for this user alone."""
    folder = folder_of(settings.store)
    return "" if folder and not os.path.isdir(folder) else _distrust(settings, name)


def _home(settings: Settings, folder: str, processor: str, *, anew: bool) -> Home:
    with _process.lock:
        if _process.home is None:
            _process.home = _made(settings, folder, processor, anew=anew)
        return _process.home


def _made(settings: Settings, folder: str, processor: str, *, anew: bool) -> Home:
    """Make the folder and set the variables, unless something stands in the way."""
    obstacle = _obstacle_to_making(folder, anew=anew)
    if obstacle:
        return Home("", (), "", obstacle)
    theirs = {kind.variable for kind in KINDS if not _is_free(kind.variable, settings)}
    if INDUCTOR.variable in theirs:  # which keeps Triton's kernels too, where nobody says otherwise
        theirs.add(TRITON.variable)
    ours = [kind for kind in KINDS if kind.variable not in theirs]
    if not ours:
        return Home("", (), "", f"{', '.join(sorted(theirs))} are set, so these caches are left to who set them")
    changes = {kind.variable: f"{folder}/{kind.name}" for kind in ours}
    changes |= {name: value for name, (kind, value) in SWITCHES.items() if kind in ours and read_variable(name) is None}
    if not takes_all_instructions(processor):
        changes.pop(COMPILER_SWITCH, None)
    late = _late(changes)
    _process.before = {name: read_variable(name) for name in changes}
    set_variables(changes)
    return Home(folder, tuple(kind.name for kind in ours), late, "")


def _obstacle_to_making(folder: str, *, anew: bool) -> str:
    """Make the folder; why it is not to be used, "" if it is: libraries must find room there, and run what they put there."""
    if anew:
        import shutil

        shutil.rmtree(folder, ignore_errors=True)
    try:
        os.makedirs(os.path.dirname(folder), mode=0o700, exist_ok=True)
        for path in (folder, f"{folder}/{DRIVER.name}"):  # libraries make their own; of the driver nobody knows
            os.makedirs(path, mode=0o700, exist_ok=True)
        if os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0):
            return f"nothing may be executed below {folder}: its file system is mounted noexec"
    except OSError as error:
        return f"{folder} cannot be made: {error.strerror}"
    return weakness_of(folder) if os.access(folder, os.W_OK) else f"{folder} cannot be written to"


def _is_free(variable: str, settings: Settings) -> bool:
    value = read_variable(variable)
    return not value or value.startswith(f"{settings.files_folder.rstrip('/')}/")


def _late(changes: Mapping[str, str]) -> str:
    """What libraries of this process have read already, though it is to change."""
    cuda: Any = getattr(sys.modules.get("torch"), "cuda", None)
    late = [
        f"{module} was imported before the start, so {variable} comes too late"
        for module, variable in _LATE
        if module in sys.modules and variable in changes
    ]
    if hasattr(cuda, "is_initialized") and cuda.is_initialized() and "cupy" not in sys.modules:
        late.append("CUDA was in use before the start, so CUDA_CACHE_PATH comes too late")
    return "; ".join(late)
