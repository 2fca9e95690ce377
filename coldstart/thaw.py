"""A process that stood still: noticing it, and making anew what must not be the same twice.

Platforms freeze a worker and let it go on later, perhaps more than once from one image (RunPod's FlashBoot gives no
notice; Modal's memory snapshots do). No code of the module runs again then: random numbers would repeat, connections are
gone, clocks have jumped.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING

from coldstart import events

if TYPE_CHECKING:
    from collections.abc import Callable

TICK_SECONDS = 1.0
BUSY_FRACTION = 0.25
"""A gap in which the process used more processor time than this was work that kept the watch waiting, not a freeze."""


class FreezeWatch:
    """Notices that this process stood still for ``threshold_seconds`` or longer: time passed and no work was done.

    A thread looks at the clocks every second or so; ``frozen_seconds`` looks once more, so a freeze is seen by the first
    event after it. Both clocks are looked at, since one of them may stand still while the process does.
    """

    def __init__(
        self,
        threshold_seconds: float,
        *,
        clocks: tuple[Callable[[], float], ...] = (time.time, time.monotonic),
        worked: Callable[[], float] = time.process_time,
    ) -> None:
        self._threshold_seconds = threshold_seconds
        self._clocks = clocks
        self._worked = worked
        self._lock = threading.Lock()
        self._last = self._now()
        self._frozen_seconds = 0.0
        self._stopped = threading.Event()

    def start(self) -> None:
        """Begin to look, in a thread of its own."""
        threading.Thread(target=self._run, name="coldstart-freeze-watch", daemon=True).start()

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()

    def look(self) -> None:
        """Look at the clocks once."""
        with self._lock:
            now = self._now()
            worked_seconds = now[-1] - self._last[-1]
            gap_seconds = max(new - old for new, old in zip(now[:-1], self._last[:-1], strict=True))
            self._last = now
            if gap_seconds >= self._threshold_seconds and worked_seconds <= gap_seconds * BUSY_FRACTION:
                self._frozen_seconds += gap_seconds

    def frozen_seconds(self) -> float:
        """How long the process stood still since this was last asked, 0.0 if it did not."""
        self.look()
        with self._lock:
            frozen_seconds, self._frozen_seconds = self._frozen_seconds, 0.0
            return frozen_seconds

    def _now(self) -> tuple[float, ...]:
        return (*(clock() for clock in self._clocks), self._worked())

    def _run(self) -> None:
        while not self._stopped.wait(min(TICK_SECONDS, self._threshold_seconds / 3)):
            self.look()


def reseed() -> None:
    """Give the generators that libraries share a new state from the system's entropy: ``random``, numpy's, torch's.

    Generators of the user's own are theirs: ``after_restore`` is the place.
    """
    import random

    random.seed()
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "seed"):  # else its import is still under way
        torch.seed()


def run_hook(name: str, hook: str, work: Callable[[], object], seconds: float) -> None:
    """Run a hook of handler ``name`` for at most ``seconds`` (0.0: as long as it takes); raises what it raises.

    One that has not returned by then goes on in its thread, which ends with the process, and is published.
    """
    if not seconds:
        work()
        return
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  raised again in the thread that asked
            failed.append(error)

    thread = threading.Thread(target=run, name=f"coldstart-{hook}", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        events.bus.publish(events.HookOverran(name, hook, seconds))
    elif failed:
        raise failed[0]
