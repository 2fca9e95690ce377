"""Warming up a class on Modal, through the handles of its package, which is imported inside."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from coldstart.deploy.warmers import POLL_SECONDS, Warmed
from coldstart.errors import CredentialsError, DeployError, PlatformBusyError, ResourceMissingError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from coldstart.deploy.prewarm import Ticket


class ModalWarmer:
    """The ``run`` method of a deployed class of Modal: ``APP/Class``. A generator is called for all its pieces."""

    def __init__(
        self, name: str, count: int, inputs: Sequence[Any], *, class_name: str, poll_seconds: float = POLL_SECONDS
    ) -> None:
        import modal

        self.name = name
        self.count = count
        self._inputs = inputs
        self._class_name = class_name
        self._poll_seconds = poll_seconds
        self._app = name.partition("/")[0]
        self._modal: Any = modal
        self._run: Any = None
        self._minimum = 0
        self._touched = False

    def _method(self) -> Any:
        if self._run is None:
            run = self._modal.Cls.from_name(self._app, self._class_name)().run
            if not hasattr(run, "autoscaler"):
                raise DeployError('this modal is too old to change an autoscaler: pip install -U "modal>=1.6"')
            self._run = run
        return self._run

    def raise_minimum(self) -> None:
        """Let the class have ``count`` containers at least, if it has fewer."""
        with self._told():
            settings = self._method().autoscaler.settings()
        self._minimum = settings.min_containers or 0
        if settings.max_containers is not None and settings.max_containers < self.count:
            raise UsageError(
                f"{self.name!r} may have {settings.max_containers} containers at most, fewer than --count {self.count}:"
                " ask for fewer, or deploy it with more"
            )
        if self._minimum < self.count:
            self._touched = True
            with self._told():
                self._method().autoscaler.update(min_containers=self.count)

    def put_back(self) -> None:
        """Make the minimum what it was, unless somebody else has changed it meanwhile."""
        if not self._touched:
            return
        try:
            with self._told():
                autoscaler = self._method().autoscaler
                if autoscaler.settings().min_containers == self.count:
                    autoscaler.update(min_containers=self._minimum)
        except DeployError as error:
            raise DeployError(
                f"the minimum of {self.name!r} may still be {self.count}, which costs money: set it back to"
                f" {self._minimum} ({error})"
            ) from error
        self._touched = False

    def warm(self, number: int, ticket: Ticket) -> Warmed:
        """Send one input, and wait for its answer. One that is given up is cancelled."""
        value = self._inputs[number % len(self._inputs)]
        with self._told():
            try:
                call = self._method().spawn(value)
            except self._modal.exception.InvalidError:  # a generator cannot be spawned
                for _ in self._method().remote_gen(value):
                    ticket.check()
                return Warmed("", None, None)
            self._await(call, ticket)
        return Warmed("", None, None)

    def _await(self, call: Any, ticket: Ticket) -> None:
        try:
            while True:
                try:
                    call.get(timeout=min(self._poll_seconds, ticket.remaining_seconds))
                except TimeoutError:
                    ticket.check()
                else:
                    return
        except BaseException as error:
            if not isinstance(error, self._modal.exception.Error):
                with suppress(self._modal.exception.Error):
                    call.cancel()
            raise

    def ready_count(self) -> int:
        """Containers that there are."""
        with self._told():
            return int(self._method().get_current_stats().num_total_runners)

    def _told(self) -> _Told:
        return _Told(self._modal, self.name)

    def planned(self) -> Iterator[str]:
        """The calls, as they would be made."""
        run = f"modal.Cls.from_name({self._app!r}, {self._class_name!r})().run"
        yield f"{run}.autoscaler.update(min_containers={self.count})"
        for number in range(self.count):
            yield f"{run}.spawn({self._inputs[number % len(self._inputs)]!r})"
        yield f"{run}.get_current_stats()"
        yield f"{run}.autoscaler.update(min_containers=<what it was>)"


class _Told:
    """A context in which Modal's own errors are told as ours."""

    def __init__(self, modal: Any, name: str) -> None:
        self._exception = modal.exception
        self._name = name

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if not isinstance(error, self._exception.Error):
            return
        text = f"Modal, of {self._name!r}: {type(error).__name__}: {error}"
        if isinstance(error, self._exception.NotFoundError):
            raise ResourceMissingError(f"{text}; give APP/Class as it was deployed") from error
        if isinstance(error, self._exception.AuthError):
            raise CredentialsError(f"{text}; run modal setup, or set MODAL_TOKEN_ID and MODAL_TOKEN_SECRET") from error
        if isinstance(error, self._exception.ConnectionError):
            raise PlatformBusyError(text) from error
        raise DeployError(text) from error


def modal_warmers(names: Sequence[str], count: int, inputs: Sequence[Any], *, class_name: str) -> list[ModalWarmer]:
    """Warmers of Modal classes. ``class_name``: of those that name none; "" is what ``coldstart deploy`` calls it.

    Raises UsageError where the modal package is not installed.
    """
    from coldstart.deploy.modal import class_name as deployed_class_name

    try:
        import modal  # noqa: F401  here, so that its absence is told once
    except ImportError as error:
        raise UsageError('Modal\'s package is not installed: pip install "coldstart-gpu[modal]"') from error
    warmers = []
    for name in names:
        app, _, given = name.partition("/")
        warmers.append(ModalWarmer(name, count, inputs, class_name=given or class_name or deployed_class_name(app)))
    return warmers
