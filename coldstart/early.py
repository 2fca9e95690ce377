"""Before the start: what a handler will need is fetched while its file is imported, or before its platform freezes it.

Before the import, what that is is read from the file's source.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from coldstart import caches, events
from coldstart.config import Settings, environment_now
from coldstart.devices import pick
from coldstart.errors import KeyUncomputableError
from coldstart.fetch import Address, default_processes
from coldstart.kernel_caches.home import set_up
from coldstart.keys import find_handlers, key_from_functions, key_from_source
from coldstart.metrics import Timeline, process_clock
from coldstart.program_start import NONE as NO_PROGRAMS
from coldstart.program_start import accepted
from coldstart.repository import Repository
from coldstart.restore import Request, Restoration
from coldstart.signing import seals_of
from coldstart.stores import StoreOptions, open_store
from coldstart.stores.base import Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from coldstart.definition import Definition
    from coldstart.devices.base import Device
    from coldstart.manifest import KeyRecord
    from coldstart.program_start import Accepted
    from coldstart.programs.recording import Recorder

NO_STORE = "no store"


class Services(NamedTuple):
    """What a start is given: settings, whether this process serves, what a proof pinned, and where events go."""

    settings: Settings
    serving: bool
    pinned: Mapping[str, str]
    bus: events.EventBus
    recorder: Recorder | None = None
    """Where calls of entry points are noted, in a process that makes a program: it starts without one."""
    cases: str = ""
    """The folder with the cases that a program is to be proven by."""

    @property
    def uses_store(self) -> bool:
        """A plain call in a user's tests must not touch real snapshots: the default store is for processes that serve."""
        return self.settings.has_store and (self.serving or self.settings.store_is_explicit)


class Opener:
    """Opens the store once, on first use, in whichever thread needs it.

    A start gives ``degraded``, and its store is the one with the local cache, whose troubles ``degraded`` is told.
    Without it every answer is the store's own: a command is to see what is there.
    """

    def __init__(self, settings: Settings, degraded: Callable[[str], None] | None = None) -> None:
        self._settings = settings
        self._degraded = degraded
        self._lock = threading.Lock()
        self._repository: Repository | None = None
        self._past = Tally()

    @property
    def tally(self) -> Tally:
        """What the store has got over, in all its openings."""
        with self._lock:
            return self._past if self._repository is None else self._past + self._repository.store.tally

    def __call__(self) -> Repository:
        """The repository, opened if it was not. Raises StoreSetupError, and ConfigError for a signing key that cannot be read."""
        with self._lock:
            if self._repository is None:
                url, options = address_of(self._settings)
                if self._degraded is None:
                    options = options._replace(cache="")
                seals = seals_of(self._settings, self._degraded)
                self._repository = Repository(open_store(url, options, degraded=self._degraded), seals=seals)
            return self._repository

    def let_go(self, settings: Settings | None = None, *, close: bool = True) -> None:
        """Open the store anew on its next use, by other ``settings`` if given. ``close``: nobody is using it now."""
        with self._lock:
            self._settings = settings or self._settings
            repository, self._repository = self._repository, None
            if repository is not None:
                self._past = self._past + repository.store.tally
        if close and repository is not None:
            repository.store.close()


def opener_of_start(name: str, services: Services) -> Opener:
    """The opener of a start of handler ``name``."""
    return Opener(services.settings, lambda reason: services.bus.publish(events.StoreDegraded(name, reason)))


def address_of(settings: Settings) -> Address:
    """Where the settings say that snapshots are."""
    return Address(settings.store, StoreOptions(*(getattr(settings, field) for field in StoreOptions._fields)))


def snapshot_name(name: str, part: str) -> str:
    """The snapshot of a part: the handler's name, and ``=part`` where the state has named parts."""
    return f"{name}={part}" if part else name


class Early:
    """Restorations begun before the start that uses them. Used only for parts whose key is still the same then."""

    def __init__(
        self,
        name: str,
        timeline: Timeline,
        opener: Opener,
        restorations: Mapping[str, Restoration],
        environment: Mapping[str, str],
        bus: events.EventBus,
    ) -> None:
        self.name = name
        self.timeline = timeline
        self.opener = opener
        self.restorations = dict(restorations)
        self.environment = environment
        self._bus = bus

    def point_hubs(self) -> None:
        """Let hub libraries, which are about to be imported, find restored files: waits until it is known which."""
        for restoration in self.restorations.values():
            manifest = restoration.manifest()
            if manifest is not None:
                caches.point_to(caches.folder_of(manifest, Path(restoration.request.files_folder)), manifest)

    def settle(self) -> None:
        """Wait until all is in memory, put it on the timeline, and leave no thread and no connection.

        What was not found is forgotten, so that it is looked for again: there may be a snapshot by then.
        """
        for part, restoration in list(self.restorations.items()):
            if not restoration.succeeded():
                del self.restorations[part]
            restoration.put_on(self.timeline)
        self.opener.let_go()

    def thaw(self, settings: Settings, changed: Mapping[str, str | None]) -> None:
        """After a freeze: other credentials, and variables of the environment that the platform has changed."""
        self.opener.let_go(settings)
        environment = {**self.environment, **changed}
        self.environment = {name: value for name, value in environment.items() if value is not None}

    def forget(self) -> None:
        """In a forked child, where the threads at work on them are not: have nothing that one could wait for."""
        self.restorations.clear()

    def cancel(self, part: str) -> None:
        """The part is not wanted after all: stop fetching it."""
        restoration = self.restorations.pop(part, None)
        if restoration is not None:
            restoration.cancel()

    def take(self, part: str, key: KeyRecord) -> Restoration | None:
        """The restoration of a part if it is of this key; one of another key is cancelled."""
        restoration = self.restorations.pop(part, None)
        if restoration is not None and restoration.request.key.digest != key.digest:
            restoration.cancel()
            self._bus.publish(
                events.SnapshotPassedOver(self.name, "the imported module has another key than its source")
            )
            return None
        return restoration


def early_restorations(path: str, name: str | None, services: Services) -> tuple[Early | None, str]:
    """Begin restoring for handler ``name`` (None: the only one) of a file that is not imported yet; or say why not."""
    timeline = Timeline(process_clock())
    if not services.uses_store:
        return None, NO_STORE
    environment = environment_now()
    with timeline.span("key from source"):
        sources = [source for source in find_handlers(path) if name in (None, source.name, source.attribute)]
        if len(sources) != 1 or not sources[0].name:
            return None, "the handler's name is computed: its start waits for the import"
        device = pick(services.settings.device)
        try:
            keys = key_from_source(sources[0], device_type=device.type, environment=environment.get)
        except KeyUncomputableError as error:
            return None, str(error)
    opener = opener_of_start(sources[0].name, services)
    programs = programs_of_start(services, device, sources[0].name).identities if sources[0].has_program else ()
    restorations = {
        part: restoration_of(snapshot_name(sources[0].name, part), key, opener, device, services, programs)
        for part, key in keys.items()
    }
    early = Early(sources[0].name, timeline, opener, restorations, environment, services.bus)
    caches.before_import("huggingface_hub", early.point_hubs)
    return early, ""


def early_of(definition: Definition, services: Services) -> Early | None:
    """Begin restoring for a handler that is imported already. None: without a store there is nothing to begin."""
    if not services.uses_store:
        return None
    timeline, environment = Timeline(process_clock()), environment_now()
    device, opener = pick(services.settings.device), opener_of_start(definition.name, services)
    restorations = {}
    programs = programs_of_start(services, device, definition.name).identities if definition.program else ()
    with timeline.span("key from functions"):
        for part in definition.load:
            with suppress(KeyUncomputableError):  # the start itself will say so
                key = key_from_functions(definition, part, device_type=device.type, environment=environment.get)
                name = snapshot_name(definition.name, part)
                restorations[part] = restoration_of(name, key, opener, device, services, programs)
    return Early(definition.name, timeline, opener, restorations, environment, services.bus)


def programs_of_start(services: Services, device: Device, snapshot: str, backend: str = "") -> Accepted:
    """The programs that a start of this snapshot accepts; a process that makes one starts without."""
    if services.recorder is not None:
        return NO_PROGRAMS
    return accepted(services.settings, device.type, snapshot, backend=backend)


def restoration_of(
    name: str, key: KeyRecord, opener: Opener, device: Device, services: Services, programs: tuple[str, ...] = ()
) -> Restoration:
    """Begin restoring one snapshot, with one of these programs if the generation has it.

    From here on the libraries of this process keep compiled kernels where the snapshot's are put.
    """
    settings = services.settings
    kernels = None
    if services.recorder is None:  # who makes a program leaves nothing behind but the program
        kernels = set_up(settings, device, name, key.digest, proves=bool(services.pinned))
    request = Request(
        name=name,
        key=key,
        open_repository=opener,
        device=device,
        threads=settings.fetch_threads,
        budget_bytes=settings.memory_budget_bytes,
        files_folder=settings.files_folder,
        address=address_of(settings),
        engine=settings.fetch_engine,
        processes=settings.fetch_processes or default_processes(),
        pinned=services.pinned.get(name, ""),
        programs=programs,
        fresh=settings.fresh,
        recovery=settings.recovery,
        ring_bytes=settings.pinned_bytes,
        kernels=kernels,
    )
    return Restoration(request, services.bus)
