"""For those who test handlers, or write a store: ``check``, contract suites, faults, a clock.

Nothing in coldstart imports this. ``check(handler, inputs=[...])`` tells whether a handler restores as it loads.
``StoreContract`` needs pytest. A store's test is a subclass with one fixture::

    class TestMyStore(StoreContract):
        @pytest.fixture
        def store(self, tmp_path):
            return MyStore(tmp_path)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coldstart.testing.clock import FakeClock
    from coldstart.testing.faults import Call, Fault, FaultyStore, LatencyStore
    from coldstart.testing.handlers import CheckFailed, CheckReport, check
    from coldstart.testing.stores import StoreContract

_HOMES = {
    "Call": "faults",
    "CheckFailed": "handlers",
    "CheckReport": "handlers",
    "FakeClock": "clock",
    "Fault": "faults",
    "FaultyStore": "faults",
    "LatencyStore": "faults",
    "StoreContract": "stores",
    "check": "handlers",
}
"""Public name -> module: imported on first use, so that a test without pytest's contracts needs no pytest."""

__all__ = [
    "Call",
    "CheckFailed",
    "CheckReport",
    "FakeClock",
    "Fault",
    "FaultyStore",
    "LatencyStore",
    "StoreContract",
    "check",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
