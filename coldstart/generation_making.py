"""Making one generation: of the state as it is, or one that adds a program to it.

The order: wait for an idle moment, take the snapshot's lease (for a program: make the program, in a process of its own),
see that no event has changed the weights, write blobs and manifest, prove the generation in a fresh process, look at what
is stored, move the ref. Any failure is raised; ``coldstart.resnapshot``, which says when, answers it.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from coldstart import events
from coldstart.capture import Writing
from coldstart.capture_sources import is_replaced
from coldstart.errors import CaptureError, ExportError, ProofError, StateChangedError, StoreError
from coldstart.generation_parents import has_program, is_overtaken, usable_without, with_parent
from coldstart.generation_plan import Outcome
from coldstart.kernel_caches.home import proof_folder
from coldstart.kernel_caches.packing import packed
from coldstart.leases import Held, hold
from coldstart.marks import changed_paths
from coldstart.program_making import ProgramMaking, making_folder
from coldstart.programs.placing import place
from coldstart.programs.tolerance import limit_of
from coldstart.proof import ProgramProof, Proof
from coldstart.refusals import note_refusal, refusal
from coldstart.save.base import STOPPED
from coldstart.save.priority import hurry
from coldstart.save.turns import Turns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from coldstart.capture import Capture, Encoding, Written
    from coldstart.generation_plan import Plan
    from coldstart.leases import Holding
    from coldstart.metrics import Transfers
    from coldstart.repository import Lookup, Repository
    from coldstart.save import Saving

NOT_COMPARED = "a fresh process started from it, but no answers were compared; give warmup= inputs whose answers repeat"
"""What is said of a generation whose proof was its start alone."""

OVERTAKEN = "another worker published this snapshot meanwhile; its generation is kept"

_LAST_PUTS_SECONDS = 5.0
"""How long puts that are under way when a capture fails may take."""


class GenerationMaking:
    """Makes generations, one at a time: ``end`` comes after every one. ``stop`` and ``hurry`` are for other threads.

    ``idle`` returns after so many seconds without events. ``stopping`` is set once ``stop`` was called.
    """

    def __init__(
        self,
        open_repository: Callable[[], Repository],
        *,
        encoding: Encoding,
        idle: Callable[[float], None],
        idle_seconds: float,
        saves: Transfers,
        bus: events.EventBus,
        saving: Callable[[], Saving],
    ) -> None:
        self.stopping = threading.Event()
        self._open_repository = open_repository
        self._encoding = encoding
        self._idle = idle
        self._idle_seconds = idle_seconds
        self._saves = saves
        self._bus = bus
        self._saving = saving
        self._child: Proof | ProgramMaking | None = None
        self._writing: Writing | None = None
        self._holding: Holding | None = None
        self._group = 0
        """The process group that is at work for this worker, 0 if none is."""
        self._is_waited_for = False
        self._stop_seconds = 0.0
        """The moment when what is under way has to be over, once ``stop`` was called."""

    @property
    def engine(self) -> str:
        """Who stores for the attempt under way, "" if it has not come so far."""
        return self._writing.saver.engine if self._writing is not None else ""

    def hurry(self) -> None:
        """From now on somebody waits: whoever works for this worker need not stand back any longer."""
        self._is_waited_for = True
        if self._group:
            hurry(self._group)

    def stop(self, seconds: float) -> None:
        """Begin no further chunk, end the process at work, and give the puts under way ``seconds`` to finish."""
        self._stop_seconds = time.monotonic() + seconds
        self.stopping.set()
        if self._child is not None:
            self._child.stop()
        writing = self._writing
        if writing is not None:
            writing.saver.stop()

    def end(self) -> None:
        """The end of an attempt, however it went: the lease is given back, and nothing is written any more.

        After a failure other puts may be under way: one that is cut off leaves a temporary file in a folder.
        """
        holding, self._holding = self._holding, None
        if holding is not None:
            holding.end()
        self._end_writing()

    def _end_writing(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.saver.stop()
            until_seconds = self._stop_seconds or time.monotonic() + _LAST_PUTS_SECONDS
            writing.saver.end(max(0.0, until_seconds - time.monotonic()))

    def of_state(self, plan: Plan, began: float) -> Outcome | Held:
        """A generation of the state, begun at a moment of the monotonic clock; Held: another worker is at it.

        Raises CaptureError, ProofError and StoreError, as ``with_program`` does.
        """
        self._idle(self._idle_seconds)
        if self.stopping.is_set():
            return Outcome.none("the worker ended before its state was captured")
        repository = self._open_repository()
        replaces = plan.replaces if plan.due_at_once else repository.look_up(plan.capture.name, plan.capture.key)
        if plan.due_at_once and is_overtaken(repository, plan.capture, replaces):
            return self.skip(plan, OVERTAKEN)
        reason = "no usable snapshot" if plan.due_at_once else "policy"
        return self._write_and_publish(plan, replaces, repository, began, reason)

    def with_program(self, plan: Plan, began: float) -> Outcome | Held:
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
            return taken
        self._holding = taken
        replaces = repository.look_up(name, key)
        is_unfit = replaces.ref is not None and replaces.ref.generation == wish.unfit_generation
        if not (wish.is_fresh or is_unfit) and has_program(repository, replaces, accepted.identities[0], wish.options):
            return self.skip(plan, "another worker made the program")._replace(program=wish.backend)
        try:
            return self._make_and_publish_program(plan, replaces, repository, began)
        except (ExportError, ProofError) as error:
            if not (self.stopping.is_set() or (self._child is not None and self._child.was_killed)):
                self._note_refusal(repository, plan, identity, str(error))
            raise

    def with_kernels(self, plan: Plan, began: float) -> Outcome | Held:
        """A generation that is the current one with the kernels that this platform's caches lack there."""
        kernels, name, key = plan.kernels, plan.capture.name, plan.capture.key
        assert kernels is not None
        self._idle(self._idle_seconds)
        repository = self._open_repository()
        earlier = refusal(repository.store, name, key, kernels.root)
        if earlier:
            return Outcome.none(f"kernel caches were tried before: {earlier}")
        taken = hold(repository, name)
        if isinstance(taken, Held):
            return taken
        self._holding = taken
        replaces = repository.look_up(name, key)
        capture = plan.capture._replace(survey=None, files=(), kinds={}, mends=False)
        alone = plan._replace(capture=capture)
        if replaces.ref is None or self.stopping.is_set():
            return Outcome.none("there is no generation to add kernel caches to")
        try:
            return self._write_and_publish(alone, replaces, repository, began, "kernels that the snapshot lacks")
        except ProofError as error:
            if not (self.stopping.is_set() or (self._child is not None and self._child.was_killed)):
                self._note_refusal(repository, plan, kernels.root, str(error))
            raise

    def _note_refusal(self, repository: Repository, plan: Plan, identity: str, reason: str) -> None:
        """Best effort: where it cannot be written other workers try too, and this one's reason is what is told."""
        name = plan.capture.name
        try:
            note_refusal(repository.store, name, plan.capture.key, identity, reason)
        except StoreError as error:
            self._bus.publish(events.StoreDegraded(name, f"that it cannot be made is not remembered: {error}"))

    def _make_and_publish_program(
        self, plan: Plan, replaces: Lookup, repository: Repository, began: float
    ) -> Outcome | Held:
        wish = plan.program
        assert wish is not None
        with making_folder() as folder:
            manifest = usable_without(repository, replaces)
            pinned = {plan.capture.name: manifest} if manifest else {}
            self._bus.publish(events.ProgramBegan(plan.capture.name, wish.backend))
            child = ProgramMaking(
                plan.origin, pinned, repository.store.url, folder, wish.backend, beside=self._between_events
            )
            self._watch(child)
            child.run()
            if self.stopping.is_set():
                return Outcome.none("the worker ended before its program was stored")
            placed = place(Path(folder), plan.capture.survey)
            capture = plan.capture._replace(program=placed, outside=wish.outside, mends=False)
            outcome = self._write_and_publish(
                plan._replace(capture=capture, due_at_once=False, adds_kernels=False),
                replaces,
                repository,
                began,
                f"a program ({wish.backend}) for this platform",
                ProgramProof(folder, wish.answers, limit_of(placed.program.entries, wish.tolerance)),
            )
            return outcome if isinstance(outcome, Held) else outcome._replace(program=wish.backend)

    def _write_and_publish(
        self,
        plan: Plan,
        replaces: Lookup,
        repository: Repository,
        began: float,
        reason: str,
        program: ProgramProof | None = None,
    ) -> Outcome | Held:
        """With the kernel caches that this worker has added; where the proof fails with them, without."""
        self._check_unchanged(plan)
        capture = with_parent(plan.capture, replaces, repository)
        parent = capture.parent if is_replaced(capture) and not capture.mends else None
        with packed(plan.kernels, parent, capture.generation, alone=plan.adds_kernels) as kernels:
            if plan.adds_kernels and (kernels is None or parent is None):
                return Outcome.none("another worker has added these kernels")
            with_kernels = capture._replace(kernels=kernels)
            try:
                return self._write_capture(plan, with_kernels, replaces, repository, began, reason, program)
            except ProofError as error:
                if kernels is None or plan.adds_kernels or self.stopping.is_set():
                    raise
                self._end_writing()
                reason = f"{reason}; kernel caches are left out, since the proof failed with them ({error})"
        return self._write_capture(plan, capture, replaces, repository, began, reason, program)

    def _write_capture(
        self,
        plan: Plan,
        capture: Capture,
        replaces: Lookup,
        repository: Repository,
        began: float,
        reason: str,
        program: ProgramProof | None,
    ) -> Outcome | Held:
        self._writing = Writing(
            capture, repository, encoding=self._encoding, saving=self._saving(), stopping=self.stopping
        )
        saver = self._writing.saver
        if self._holding is None:
            taken = hold(saver.repository, capture.name)
            if isinstance(taken, Held):
                return taken
            self._holding = taken
        if is_overtaken(repository, capture, replaces):  # by who had the lease before
            return self.skip(plan, OVERTAKEN)
        self._bus.publish(events.CaptureBegan(capture.name, capture.generation, reason))
        with self._between_events(saver.group):
            written = self._writing.write(self._pace)
        self._check_unchanged(plan)
        proof = Proof(
            plan.origin,
            {capture.name: written.manifest_key},
            repository.store.url,
            beside=self._between_events,
            program=program,
        )
        self._watch(proof)
        try:
            compared = proof.run(capture.warmup_digests)
        finally:
            _forget_proof(plan)
        if self.stopping.is_set():
            return Outcome.none("the worker ended before the generation was published", saver.engine)
        self._writing.confirm(written)
        saver.repository.publish(written.manifest, written.manifest_key, replaces=replaces)
        return self._published(written, time.monotonic() - began, "" if compared else NOT_COMPARED, saver.engine)

    def _watch(self, child: Proof | ProgramMaking) -> None:
        """Let ``stop`` end this process, also if it was called a moment ago and has not seen it."""
        self._child = child
        if self.stopping.is_set():
            child.stop()

    def skip(self, plan: Plan, reason: str) -> Outcome:
        """No generation, for a reason that is no failure."""
        self._bus.publish(events.CaptureSkipped(plan.capture.name, reason))
        return Outcome.none(reason, self.engine)

    @contextmanager
    def _between_events(self, group: int) -> Iterator[None]:
        """While the block runs, a process group (0: none) works only between events, or for moments beside them."""
        if not group:
            yield
            return
        turns = Turns(group, self._give_way)
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
        if self.stopping.is_set():
            raise CaptureError(STOPPED)
        self._give_way(0.0)

    def _give_way(self, seconds: float) -> None:
        """Wait for an idle moment, as long as it takes with the lease: compiling a program takes longer than one lasts."""
        holding = self._holding
        if holding is not None:
            holding.keep()
        self._idle(seconds)

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


def _forget_proof(plan: Plan) -> None:
    """Remove the kernels that the proof's process has left: it was ended when it had answered."""
    if plan.kernels is not None and plan.kernels.folder:
        import shutil

        shutil.rmtree(proof_folder(plan.kernels.folder), ignore_errors=True)
