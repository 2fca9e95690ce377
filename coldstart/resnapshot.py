"""Making a new generation, off the request path: when, and in which order.

The order: wait for an idle moment, see that no event has changed the weights, take the snapshot's lease, write blobs and
manifest, prove the generation in a fresh process, look at what is stored, move the ref. Any failure ends here as an event and
a reason; it never reaches a request. Who does not get the lease leaves the capture to who has it, and asks again in a while, as
long as the snapshot is missing.

A restored worker that is to make none does not import this module, nor what it stands on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart import events
from coldstart.caches import own_files
from coldstart.capture import Encoding, Writing, kind_of
from coldstart.definition import Policy
from coldstart.errors import (
    CaptureError,
    ColdstartError,
    ExportError,
    ProofError,
    SnapshotError,
    StateChangedError,
    StoreError,
)
from coldstart.leases import Held, hold
from coldstart.program_making import ProgramMaking, making_folder
from coldstart.programs.placing import place
from coldstart.programs.record import programs_of
from coldstart.programs.tolerance import limit_of
from coldstart.proof import ProgramProof, Proof
from coldstart.refusals import note_refusal, refusal
from coldstart.save import IN_THREAD
from coldstart.save.base import STOPPED
from coldstart.save.priority import hurry, lower_priority
from coldstart.save.turns import Turns

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from coldstart.capture import Capture, Written
    from coldstart.errand import Origin
    from coldstart.frameworks import Survey
    from coldstart.leases import Holding
    from coldstart.metrics import Transfers
    from coldstart.program_start import Accepted
    from coldstart.repository import Lookup, Repository
    from coldstart.save import Saving


class Plan(NamedTuple):
    """A generation that is to be made. ``marks``: what the weights looked like before anyone could change them.

    ``capture`` lacks its parent and number, which are settled when it is due. ``due_at_once``: there is no usable
    generation for the key; else the handler's policy says when, counted from ``created_seconds`` (Unix time).
    ``program``: one that this platform lacks, to be made once there is a generation without it, or at once if none can be.
    """

    capture: Capture
    replaces: Lookup
    marks: Mapping[str, Any]
    origin: Origin
    due_at_once: bool
    created_seconds: float
    program: ProgramWish | None = None


class ProgramWish(NamedTuple):
    """A program that is to be made. ``options``: a digest of what the handler asks for.

    ``accepted`` tells, when it is due, whether this platform can run it and the store may give it. ``is_fresh``: try even
    if it failed before. ``answers``: those of the first warm-up, as JSON values. ``tolerance``: by dtype, where it is not the
    default. ``outside``: whether the array at a path is needed beside the program; None: none is.
    ``unfit_generation``: one whose program is not called like that any more, 0 for none.
    """

    backend: str
    options: str
    accepted: Callable[[], Accepted]
    is_fresh: bool
    answers: tuple[Any, ...]
    tolerance: Mapping[str, float]
    outside: Callable[[str], bool] | None
    unfit_generation: int = 0


class Outcome(NamedTuple):
    """What became of a plan: a published generation, or the reason why there is none.

    ``engine``: who hashed, encoded and stored, and why if a process of its own was wanted; "" if nobody had to.
    """

    published: bool
    generation: int
    raw_bytes: int
    stored_bytes: int
    written_bytes: int
    reused_bytes: int
    seconds: float
    reason: str
    engine: str = ""
    program: str = ""
    """The backend of the program that it has and this outcome is about, "" for a generation of the state alone."""

    @classmethod
    def none(cls, reason: str, engine: str = "") -> Outcome:
        """No generation, for ``reason``."""
        return cls(False, 0, 0, 0, 0, 0, 0.0, reason, engine)


NOT_COMPARED = "a fresh process started from it, but no answers were compared; give warmup= inputs whose answers repeat"
"""What is said of a generation whose proof was its start alone."""

OVERTAKEN = "another worker published this snapshot meanwhile; its generation is kept"

_LAST_PUTS_SECONDS = 5.0
"""How long puts that are under way when a capture fails may take."""
_REAP_SECONDS = 0.5
"""How long ending a saver process may take when its time is over."""

POLL_SECONDS = 0.5
"""How often a policy's conditions are looked at."""


_Make = Callable[[Plan, float], Outcome]
"""Carries a plan out, begun at a moment of the monotonic clock."""


class Resnapshot:
    """Makes the planned generations, one after another, in a thread of its own, then what the handler's policy asks for."""

    def __init__(
        self,
        plans: list[Plan],
        open_repository: Callable[[], Repository],
        *,
        encoding: Encoding,
        idle: Callable[[float], None],
        idle_seconds: float,
        policy: Policy,
        served: Callable[[], int],
        saves: Transfers,
        bus: events.EventBus,
        saving: Callable[[], Saving] = lambda: IN_THREAD,
    ) -> None:
        self.outcomes: list[Outcome] = []
        self._first_done = threading.Event()
        self._policy = policy
        self._served = served
        self._saves = saves
        self._plans = plans
        self._open_repository = open_repository
        self._encoding = encoding
        self._idle = idle
        self._idle_seconds = idle_seconds
        self._bus = bus
        self._saving = saving
        self._child: Proof | ProgramMaking | None = None
        self._writing: Writing | None = None
        self._group = 0
        """The process group that is at work for this worker, 0 if none is."""
        self._is_waited_for = False
        self._holding: Holding | None = None
        self._postponed: list[tuple[float, Plan, _Make]] = []
        """Plans that another worker is at, each with the moment when to ask again."""
        self._stopping = threading.Event()
        self._stop_seconds = 0.0
        """The moment when what is under way has to be over, once ``stop`` was called."""
        self._thread = threading.Thread(target=self._run, name="coldstart-capture", daemon=True)
        self._thread.start()

    def wait_first(self, seconds: float) -> bool:
        """Wait until what was due at once is done, or ``seconds`` have passed; True if it is done.

        Whoever waits has nothing else to do, so those who do it for this worker need not stand back any longer.
        """
        if seconds > 0:
            self._is_waited_for = True
            if self._group:
                hurry(self._group)
        return self._first_done.wait(seconds)

    def stop(self, seconds: float) -> None:
        """Begin no further chunk, end the proof, and give the puts under way ``seconds`` to finish."""
        self._stop_seconds = time.monotonic() + seconds
        self._stopping.set()
        if self._child is not None:
            self._child.stop()
        writing = self._writing
        if writing is not None:
            writing.saver.stop()
        self._thread.join(seconds + _REAP_SECONDS)

    def _run(self) -> None:
        lower_priority()
        for plan in self._plans:
            if plan.due_at_once:
                self._attempt(plan, self._make)
            if plan.program is not None and not self._stopping.is_set():
                self._attempt(plan, self._make_program)
        self._first_done.set()
        due = [_Due(plan, self._policy, self._served()) for plan in self._plans]
        while (self._policy != Policy() or self._postponed) and not self._stopping.wait(POLL_SECONDS):
            self._attempt_postponed()
            for condition in due:
                served = self._served()  # what is served during the capture counts for the next
                if condition.is_met(served):
                    self._attempt(condition.plan, self._make)
                    condition.restart(served)

    def _attempt_postponed(self) -> None:
        now = time.monotonic()
        due = [each for each in self._postponed if each[0] <= now]
        self._postponed = [each for each in self._postponed if each[0] > now]
        for _, plan, make in due:
            self._attempt(plan, make)

    def _attempt(self, plan: Plan, make: _Make) -> None:
        began = time.monotonic()
        try:
            outcome = make(plan, began)
        except Exception as error:  # noqa: BLE001  an edge of the process: a failing capture must not take the worker along
            self._bus.publish(events.CaptureFailed(plan.capture.name, events.error_text(error)))
            reason = str(error) if isinstance(error, ColdstartError) else events.error_text(error)
            outcome = Outcome.none(reason, self._writing.saver.engine if self._writing else "")
            if make == self._make_program and plan.program is not None:
                outcome = outcome._replace(program=plan.program.backend)
        finally:
            self._end_writing()
        self.outcomes.append(outcome)

    def _end_writing(self) -> None:
        """After a failure other puts may be under way: one that is cut off leaves a temporary file in a folder."""
        holding, self._holding = self._holding, None
        if holding is not None:
            holding.end()
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.saver.stop()
            until_seconds = self._stop_seconds or time.monotonic() + _LAST_PUTS_SECONDS
            writing.saver.end(max(0.0, until_seconds - time.monotonic()))

    def _make(self, plan: Plan, began: float) -> Outcome:
        self._idle(self._idle_seconds)
        if self._stopping.is_set():
            return Outcome.none("the worker ended before its state was captured")
        repository = self._open_repository()
        replaces = plan.replaces if plan.due_at_once else repository.look_up(plan.capture.name, plan.capture.key)
        if plan.due_at_once and _is_overtaken(repository, plan.capture, replaces):
            return self._skip(plan, OVERTAKEN)
        reason = "no usable snapshot" if plan.due_at_once else "policy"
        return self._write_and_publish(plan, replaces, repository, began, reason)

    def _make_program(self, plan: Plan, began: float) -> Outcome:
        """A generation with the program, made in a process of its own from the generation that there is, if there is one.

        A program that cannot be made is noted in the store, so that other workers need not try.
        """
        wish, name, key = plan.program, plan.capture.name, plan.capture.key
        assert wish is not None
        self._idle(self._idle_seconds)
        accepted = wish.accepted()
        if not accepted.identities:
            return Outcome.none(accepted.obstacle)._replace(program=wish.backend)
        repository = self._open_repository()
        identity = f"{accepted.identities[0]}-{wish.options}"
        earlier = "" if wish.is_fresh else refusal(repository.store, name, key, identity)
        if earlier:
            return Outcome.none(f"it was tried before: {earlier} (COLDSTART_FRESH=on tries again)")._replace(
                program=wish.backend
            )
        taken = hold(repository, name)
        if isinstance(taken, Held):
            return self._postpone(plan, taken, "", self._make_program)
        self._holding = taken
        replaces = repository.look_up(name, key)
        is_unfit = replaces.ref is not None and replaces.ref.generation == wish.unfit_generation
        if not (wish.is_fresh or is_unfit) and _has_program(repository, replaces, accepted.identities[0], wish.options):
            return self._skip(plan, "another worker made the program")
        try:
            return self._make_and_publish_program(plan, replaces, repository, began)
        except (ExportError, ProofError) as error:
            if not self._stopping.is_set():
                note_refusal(repository.store, name, key, identity, str(error))
            raise

    def _make_and_publish_program(self, plan: Plan, replaces: Lookup, repository: Repository, began: float) -> Outcome:
        from pathlib import Path

        wish = plan.program
        assert wish is not None
        with making_folder() as folder:
            manifest = _usable_without(repository, replaces)
            pinned = {plan.capture.name: manifest} if manifest else {}
            self._bus.publish(events.ProgramBegan(plan.capture.name, wish.backend))
            self._child = ProgramMaking(
                plan.origin, pinned, repository.store.url, folder, wish.backend, beside=self._between_events
            )
            self._child.run()
            if self._stopping.is_set():
                return Outcome.none("the worker ended before its program was stored")
            placed = place(Path(folder), plan.capture.survey)
            capture = plan.capture._replace(program=placed, outside=wish.outside, mends=False)
            outcome = self._write_and_publish(
                plan._replace(capture=capture, due_at_once=False),
                replaces,
                repository,
                began,
                f"a program ({wish.backend}) for this platform",
                ProgramProof(folder, wish.answers, limit_of(placed.program.entries, wish.tolerance)),
            )
            return outcome._replace(program=wish.backend)

    def _write_and_publish(
        self,
        plan: Plan,
        replaces: Lookup,
        repository: Repository,
        began: float,
        reason: str,
        program: ProgramProof | None = None,
    ) -> Outcome:
        self._check_unchanged(plan)
        capture = _with_parent(plan.capture, replaces, repository)
        self._writing = Writing(
            capture, repository, encoding=self._encoding, saving=self._saving(), stopping=self._stopping
        )
        saver = self._writing.saver
        if self._holding is None:
            taken = hold(saver.repository, capture.name)
            if isinstance(taken, Held):
                return self._postpone(plan, taken, saver.engine, self._make)
            self._holding = taken
        if _is_overtaken(repository, capture, replaces):  # by who had the lease before
            return self._skip(plan, OVERTAKEN, saver.engine)
        self._bus.publish(events.CaptureBegan(capture.name, capture.generation, reason))
        with self._between_events(saver.group):
            written = self._writing.write(self._pace)
        self._check_unchanged(plan)
        proof = self._child = Proof(
            plan.origin,
            {capture.name: written.manifest_key},
            repository.store.url,
            beside=self._between_events,
            program=program,
        )
        compared = proof.run(capture.warmup_digests)
        if self._stopping.is_set():
            return Outcome.none("the worker ended before the generation was published", saver.engine)
        self._writing.confirm(written)
        saver.repository.publish(written.manifest, written.manifest_key, replaces=replaces)
        return self._published(written, time.monotonic() - began, "" if compared else NOT_COMPARED, saver.engine)

    def _postpone(self, plan: Plan, held: Held, engine: str, make: _Make) -> Outcome:
        """Leave a capture to who has the lease. What a policy asks for is not asked for again."""
        if plan.due_at_once or make == self._make_program:
            self._postponed.append((time.monotonic() + held.retry_seconds(), plan, make))
        return self._skip(plan, f"{held.owner} captures this snapshot", engine)

    def _skip(self, plan: Plan, reason: str, engine: str = "") -> Outcome:
        self._bus.publish(events.CaptureSkipped(plan.capture.name, reason))
        return Outcome.none(reason, engine)

    @contextmanager
    def _between_events(self, group: int) -> Iterator[None]:
        """While the block runs, a process group (0: none) works only between events, or for moments beside them."""
        if not group:
            yield
            return
        turns = Turns(group, self._idle)
        self._group = group
        if self._is_waited_for:
            hurry(group)
        try:
            yield
        finally:
            self._group = 0
            turns.end()

    def _published(self, written: Written, seconds: float, reason: str, engine: str) -> Outcome:
        manifest = written.manifest
        self._saves.add(transferred_bytes=written.written_bytes, seconds=seconds)
        self._bus.publish(
            events.CaptureEnded(
                manifest.name,
                manifest.generation,
                manifest.raw_bytes,
                written.written_bytes,
                written.reused_bytes,
                seconds,
            )
        )
        return Outcome(
            True,
            manifest.generation,
            manifest.raw_bytes,
            manifest.stored_bytes,
            written.written_bytes,
            written.reused_bytes,
            seconds,
            reason,
            engine,
        )

    def _pace(self) -> None:
        """Between two chunks: give way to events for a moment, and end when the worker does."""
        if self._stopping.is_set():
            raise CaptureError(STOPPED)
        if self._holding is not None:
            self._holding.keep()
        self._idle(0.0)

    def _check_unchanged(self, plan: Plan) -> None:
        if plan.capture.survey is None:
            return
        changed = changed_paths(plan.capture.survey, plan.marks, plan.capture.kinds)
        if changed:
            self._bus.publish(events.WeightsChanged(plan.capture.name, changed))
            raise StateChangedError(
                f"init, the warm-up or events changed {len(changed)} array(s) of the state, such as {changed[0]};"
                f" change a copy instead, or declare it with kinds={{{changed[0]!r}: 'other'}} if later workers shall start"
                " from the changed bytes",
                snapshot=plan.capture.name,
            )


def _usable_without(repository: Repository, replaces: Lookup) -> str:
    """The key of the current generation's manifest, "" where a start without a program cannot use it and has to run ``load``."""
    if replaces.ref is None:
        return ""
    try:
        manifest = repository.manifest(replaces.ref.manifest, name=replaces.ref.name)
    except (StoreError, SnapshotError):
        return ""
    return replaces.ref.manifest if manifest.rung != "files" or own_files(manifest) else ""


def _has_program(repository: Repository, replaces: Lookup, identity: str, options: str) -> bool:
    """Whether the current generation has this program already, as it is wished for."""
    if replaces.ref is None:
        return False
    try:
        manifest = repository.manifest(replaces.ref.manifest, name=replaces.ref.name)
    except (StoreError, SnapshotError):
        return False
    return any((each.id, each.options) == (identity, options) for each in programs_of(manifest.programs))


class _Due:
    """When a plan is due again by the handler's policy."""

    def __init__(self, plan: Plan, policy: Policy, served: int) -> None:
        self.plan = plan._replace(due_at_once=False, capture=plan.capture._replace(mends=False))
        self._policy = policy
        self._created_seconds = plan.created_seconds or time.time()
        self._served = served
        self._since_seconds = time.monotonic()

    def is_met(self, served: int) -> bool:
        """Whether one of the policy's conditions holds."""
        policy = self._policy
        return bool(
            (policy.after_events and served - self._served >= policy.after_events)
            or (policy.interval_seconds and time.monotonic() - self._since_seconds >= policy.interval_seconds)
            or (policy.maximum_age_seconds and time.time() - self._created_seconds >= policy.maximum_age_seconds)
        )

    def restart(self, served: int) -> None:
        """Count anew, after an attempt whatever its outcome: a failing one must not be repeated every half second."""
        self._served, self._since_seconds, self._created_seconds = served, time.monotonic(), time.time()


def _with_parent(capture: Capture, replaces: Lookup, repository: Repository) -> Capture:
    """The capture with its number and its parent: the generation it replaces, else the newest of another key.

    An unreadable parent is no obstacle: it only means that nothing is reused by it.
    """
    parent, parent_key = None, ""
    known = replaces.ref or replaces.newest
    if replaces.ref is None and known is not None and known.key.digest == capture.key.digest:
        known = None  # of a deleted snapshot, whose blobs are the collector's
    if known is not None:
        try:
            parent, parent_key = repository.manifest(known.manifest, name=capture.name), known.manifest
        except (StoreError, SnapshotError):
            parent, parent_key = None, ""
    generation = repository.next_generation(capture.name, capture.key, replaces.ref)
    return capture._replace(parent=parent, parent_key=parent_key, generation=generation)


def _is_overtaken(repository: Repository, capture: Capture, replaces: Lookup) -> bool:
    """Whether a generation was published since ``replaces`` was looked up: then nothing need be written."""
    current = repository.look_up(capture.name, capture.key).ref
    return current is not None and (replaces.ref is None or current.manifest != replaces.ref.manifest)


def marks_of(survey: Survey) -> dict[str, Any]:
    """What every array looks like now: the framework's version counter, or a hash of the bytes where it keeps none."""
    marks: dict[str, Any] = {}
    hashes: dict[int, str] = {}
    for found in survey.leaves:
        index = found.leaf.buffer
        if found.version is not None:
            marks[found.leaf.path] = found.version()
        elif index >= 0:
            if index not in hashes:
                hashes[index] = _hash(survey.storages[index].data)
            marks[found.leaf.path] = hashes[index]
    return marks


def changed_paths(survey: Survey, marks: Mapping[str, Any], kinds: Mapping[str, str]) -> tuple[str, ...]:
    """Paths of the weights that differ from ``marks``; what ``kinds`` declares as changing is left out."""
    hashes: dict[int, str] = {}
    changed = []
    for found in survey.leaves:
        mark, index = marks.get(found.leaf.path), found.leaf.buffer
        if mark is None or kind_of(found.leaf.path, kinds) != "weights":
            continue
        if found.version is not None:
            now: Any = found.version()
        else:
            now = hashes[index] = hashes.get(index) or _hash(survey.storages[index].data)
        if now != mark:
            changed.append(found.leaf.path)
    return tuple(changed)


def _hash(data: Any) -> str:
    from blake3 import blake3

    return str(blake3(data).hexdigest())
