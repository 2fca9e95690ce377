"""A handler project in a folder, whose keys are computed before and after the import of the handler."""

from __future__ import annotations

import importlib.util
import itertools
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from coldstart.errors import KeyUncomputableError
from coldstart.keys import find_handlers, key_from_functions, key_from_source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import ModuleType

    from coldstart.manifest import KeyRecord

    Keys = Mapping[str, KeyRecord]

START = "from coldstart import coldstart\n"
LOAD = "def load(ctx): return use(X)\n"
HANDLER = """
@coldstart("m", load=load)
def handler(event, model):
    return model
"""


class Project:
    """A folder with a handler file and modules beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment: dict[str, str] = {}
        self.device = "cpu"
        self._numbers = itertools.count()

    @property
    def path(self) -> str:
        return str(self.folder / "handler.py")

    def write(self, text: str, name: str = "handler.py") -> None:
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(textwrap.dedent(text))
        importlib.invalidate_caches()

    def line(self, text: str) -> int:
        """The number of the first line of the handler's file that contains a text."""
        lines = Path(self.path).read_text().splitlines()
        return next(number for number, line in enumerate(lines, 1) if text in line)

    def before(self) -> Keys:
        """Keys from the file alone."""
        (handler,) = find_handlers(self.path)
        return key_from_source(handler, device_type=self.device, environment=self.environment.get)

    def module(self) -> ModuleType:
        """The handler's module, imported anew, with nothing left of earlier imports."""
        forget(self.folder)
        spec = importlib.util.spec_from_file_location(f"handler_{next(self._numbers)}", self.path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    def after(self, handler: Any = None) -> Keys:
        """Keys from the objects of the imported module."""
        definition = (handler or self.module().handler).__coldstart__
        return {
            part: key_from_functions(definition, part, device_type=self.device, environment=self.environment.get)
            for part in definition.load
        }

    def key(self, text: str | None = None) -> KeyRecord:
        """The one key of the handler, the same before and after the import."""
        (key,) = self.keys(text).values()
        return key

    def keys(self, text: str | None = None) -> Keys:
        if text is not None:
            self.write(text)
        before, after = self.before(), self.after()
        assert before == after
        return before

    def load_digest(self, body: str) -> str:
        """The digest of part ``load`` for a file made of this body and a plain handler that uses ``load``."""
        return self.key(START + textwrap.dedent(body) + HANDLER).parts["load"]

    def changes(self, old: str, new: str) -> bool:
        return self.load_digest(old) != self.load_digest(new)


def forget(folder: Path) -> None:
    """Drop the modules of a folder, so that they are imported anew."""
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(folder)):
            del sys.modules[name]


@contextmanager
def project_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    """A project whose modules can be imported, and are forgotten at the end."""
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a rewritten file of the same second and size is read anew
    yield Project(folder)
    forget(folder)


def shape(text: str) -> str:
    """A handler file of this text: dedented, with coldstart imported."""
    text = textwrap.dedent(text)
    future = "from __future__ import annotations\n"
    return (future if future in text else "") + START + text.replace(future, "")


def uncomputable(compute: Callable[[], object]) -> str:
    """The text of the error with which a key is refused."""
    with pytest.raises(KeyUncomputableError) as caught:
        compute()
    return str(caught.value)
