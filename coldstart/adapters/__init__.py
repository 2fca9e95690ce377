"""One thin file a platform; its SDK is imported inside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coldstart.config import platform_name
from coldstart.errors import UsageError

if TYPE_CHECKING:
    from coldstart.definition import Definition


def serve(definition: Definition, handler: Any) -> None:
    """Serve events on the platform that this process finds itself on, until it ends."""
    from coldstart.adapters import local

    platform = platform_name()
    if platform != "local":
        raise UsageError(f"this looks like a worker of {platform}, which this version of coldstart does not serve yet")
    local.serve(definition, handler)
