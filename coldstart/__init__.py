"""Cold starts of inference workers from snapshots of their state.

Importing this package loads a few small modules of the standard library and nothing else: names are imported when they
are first used, and no import does any work.

    from coldstart import coldstart

    @coldstart("embed", load=lambda: SentenceTransformer("all-MiniLM-L6-v2"))
    def handler(event, model):
        return model.encode(event["input"]["texts"]).tolist()
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from coldstart.api import coldstart as coldstart
    from coldstart.api import prefetch as prefetch
    from coldstart.api import serve as serve
    from coldstart.api import subscribe as subscribe
    from coldstart.context import Context as Context
    from coldstart.decorator import Handler as Handler
    from coldstart.definition import Policy as Policy
    from coldstart.definition import Warmup as Warmup
    from coldstart.errors import ColdstartError as ColdstartError
    from coldstart.exports import Export as Export
    from coldstart.exports import export as export

from coldstart.terms import VERSION as __version__  # noqa: E402, N811  what checkers see stands first

# Public name -> the module that holds it. The whole public surface.
_HOMES = {
    "ColdstartError": "coldstart.errors",
    "Context": "coldstart.context",
    "Export": "coldstart.exports",
    "Handler": "coldstart.decorator",
    "Policy": "coldstart.definition",
    "Warmup": "coldstart.definition",
    "coldstart": "coldstart.api",
    "export": "coldstart.exports",
    "prefetch": "coldstart.api",
    "serve": "coldstart.api",
    "subscribe": "coldstart.api",
}

__all__ = [
    "ColdstartError",
    "Context",
    "Export",
    "Handler",
    "Policy",
    "Warmup",
    "__version__",
    "coldstart",
    "export",
    "prefetch",
    "serve",
    "subscribe",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'coldstart' has no attribute {name!r}")
    module = __import__(home, fromlist=[name])
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
