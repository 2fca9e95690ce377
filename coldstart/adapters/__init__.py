"""Serving events: one file a platform (``local``, ``http``, ``runpod``, ``modal``), which alone imports its SDK.

``answers``, ``calls``, ``admission``, ``connection`` and ``signals`` are what they share.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coldstart.config import platform_name
from coldstart.errors import UsageError

if TYPE_CHECKING:
    from coldstart.definition import Definition


def serve(definition: Definition, handler: Any) -> None:
    """Serve events on the platform that this process finds itself on, until it ends.

    Raises UsageError in a container of Modal, which calls methods of a class and runs no loop of ours.
    """
    platform = platform_name()
    if platform == "runpod":
        from coldstart.adapters import runpod

        runpod.serve(definition, handler)
    elif platform == "modal":
        raise UsageError(
            "a container of Modal runs no worker loop: deploy the file with `coldstart deploy modal FILE`, or make a class"
            " of the handler with coldstart.adapters.modal.service(app, handler)"
        )
    else:
        from coldstart.adapters import local

        local.serve(definition, handler)
