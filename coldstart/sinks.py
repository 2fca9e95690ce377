"""Events as log lines: one line an event on standard error, as JSON or for people. structlog is imported on call only.

structlog is not configured globally: the user's own set-up of it stays as it is, and ours does not depend on it.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, TextIO

from coldstart.config import redactor
from coldstart.events import (
    CaptureFailed,
    FellBack,
    FetchProgress,
    HookOverran,
    PhaseBegan,
    PhaseSlow,
    PoolPassedOver,
    Recovered,
    StateChanged,
    StoreDegraded,
    SubscriberFailed,
    UserLine,
    WeightsChanged,
    WorkerFailed,
    bus,
    error_text,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, MutableMapping

    from coldstart.config import Settings
    from coldstart.events import Event, EventBus

_THAWED = "worker_thawed"
_LEVELS: Mapping[type[Any], str] = {
    PhaseBegan: "debug",
    StateChanged: "debug",
    CaptureFailed: "warning",
    FellBack: "warning",
    HookOverran: "warning",
    PhaseSlow: "warning",
    PoolPassedOver: "warning",
    Recovered: "warning",
    StoreDegraded: "warning",
    WeightsChanged: "warning",
    SubscriberFailed: "error",
    WorkerFailed: "error",
}
"""Every other event is ``info``."""


PROGRESS_LINE_SECONDS = 5.0
"""How far apart the lines are that say how far a fetch is."""


def attach_structlog(bus: EventBus, settings: Settings, *, stream: TextIO | None = None) -> Callable[[], None]:
    """Write the events of ``bus``, past ones first, to ``stream`` (default: standard error); returns what ends it.

    ``settings.log`` chooses the form (with ``off`` nothing is attached) and ``settings.log_level`` the least level.
    """
    if settings.log == "off":
        return lambda: None
    import structlog

    redaction = _Redaction(settings)
    logger = structlog.wrap_logger(
        structlog.WriteLogger(sys.stderr if stream is None else stream),
        processors=[
            redaction.fields,
            structlog.processors.JSONRenderer(default=_plain) if settings.log == "json" else _console_line,
            redaction.line,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(settings.log_level),
        context_class=dict,
    )

    paces: dict[str, float] = {}

    def write(event: Event, published_seconds: float) -> None:
        if isinstance(event, FetchProgress) and not _is_due(paces, event.name, published_seconds):
            return
        level = _LEVELS.get(type(event), "info")
        getattr(logger, level)(
            event_name(type(event)), timestamp=_timestamp(published_seconds), level=level, **_fields(event)
        )

    return bus.subscribe(write, replay=True, stamped=True)


_lock = threading.Lock()
_attached = False


def attach_once(settings: Settings) -> None:
    """``attach_structlog`` to this process' bus, with the events kept so far; the second call does nothing.

    Imports structlog: not before the first answer, unless the start takes so long that people want to see where it is.
    """
    global _attached  # noqa: PLW0603  once a process
    with _lock:
        if _attached or settings.log == "off":
            return
        _attached = True
    attach_structlog(bus, settings)


def _is_due(paces: dict[str, float], name: str, now_seconds: float) -> bool:
    if now_seconds < paces.get(name, 0.0) + PROGRESS_LINE_SECONDS:
        return False
    paces[name] = now_seconds
    return True


def event_name(kind: type[Any]) -> str:
    """The name of an event in the log: ``PhaseEnded`` is ``phase_ended``."""
    return re.sub("(?<!^)([A-Z])", r"_\1", kind.__name__).lower()


def _fields(event: Event) -> dict[str, Any]:
    """An event's fields. The user's own, whose names may be any, stay together under one name."""
    if isinstance(event, UserLine):
        return {"name": event.name, "message": event.message, "fields": dict(event.fields)}
    if isinstance(event, FetchProgress):
        rate = event.fetched_bytes / event.seconds if event.seconds else 0.0
        left = (event.total_bytes - event.fetched_bytes) / rate if rate else None
        return {**event._asdict(), "bytes_per_second": round(rate), "left_seconds": left}
    return event._asdict()


def _timestamp(unix_seconds: float) -> str:
    whole, milliseconds = divmod(round(unix_seconds * 1000), 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{milliseconds:03d}Z"


def _plain(value: object) -> str:
    return error_text(value) if isinstance(value, BaseException) else str(value)


def _console_line(_logger: object, _level: str, entry: MutableMapping[str, Any]) -> str:
    """``12:00:00.250Z info    phase_ended name=minilm phase=weight_load seconds=0.062 skipped=''``."""
    moment, level, event = entry.pop("timestamp").partition("T")[2], entry.pop("level"), entry.pop("event")
    return " ".join(
        (moment, f"{level:7}", event, *(f"{field}={_console_value(value)}" for field, value in entry.items()))
    )


def _console_value(value: object) -> str:
    """A value on one line: texts that could be mistaken or could steer a terminal are quoted and escaped."""
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, BaseException):
        value = error_text(value)
    if isinstance(value, str) and re.fullmatch("[!#-&(-<>-~]+", value):
        return value
    return repr(value)


class _Redaction:
    """The secrets of this process, taken out of what is logged: twice, of fields and then of the finished line.

    A thaw may bring other credentials, so they are looked up anew after it.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._redactor = redactor(settings)

    def fields(self, _logger: object, _level: str, entry: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """A processor before the renderer."""
        if entry["event"] == _THAWED:
            self._redactor = redactor(self._settings)
        clean: dict[str, Any] = self._redactor.value(dict(entry))
        return clean

    def line(self, _logger: object, _level: str, line: Any) -> str:
        """A processor after it: values that a renderer has written in its own way."""
        return self._redactor.by_value(str(line))
