"""The files that an image gets: the handler's own, and nothing else."""

from __future__ import annotations

import re

import pytest

from coldstart.deploy import sources as module
from coldstart.deploy.sources import source_files
from coldstart.errors import HandlerError
from coldstart.script import read_script

HANDLER = (
    "from coldstart import coldstart\n{imports}\n@coldstart('m', load=one{options})\ndef handler(event, model): ...\n"
)


class Folder:
    """A handler's folder, with files of any kind."""

    def __init__(self, path):
        self.path = path

    def write(self, *names, **texts):
        """Files by name: empty ones, and modules with a text."""
        for name, text in {**dict.fromkeys(names, ""), **{f"{name}.py": text for name, text in texts.items()}}.items():
            place = self.path / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text)

    def handler(self, imports="", options=""):
        """The handler's file."""
        (self.path / "handler.py").write_text(HANDLER.format(imports=imports, options=options))

    def names(self, *include):
        """The relative names that are found."""
        path = str(self.path / "handler.py")
        found = source_files(path, read_script(path)._replace(include=include))
        assert all(absolute == str(self.path / name) for absolute, name in found)
        return [name for _, name in found]


@pytest.fixture
def folder(tmp_path):
    """An empty handler's folder, with a neighbour outside it."""
    (tmp_path / "work").mkdir()
    return Folder(tmp_path / "work")


def test_imported_modules_are_found_through_imports(folder):
    """Modules that are imported, in functions too, are taken with those that they import; neighbours are not."""
    folder.handler("import first\nimport json, numpy, not_there_at_all\ndef later():\n    from second import thing")
    folder.write("second.py", "unused.py", first="import third", third="import first")
    assert folder.names() == ["first.py", "handler.py", "second.py", "third.py"]


def test_a_package_is_taken_whole_without_caches(folder):
    """A package comes with its data files, but without caches, hidden files and virtual environments."""
    folder.handler("from package.inner import thing")
    names = ["package/__init__.py", "package/inner.py", "package/sub/__init__.py", "package/words.txt"]
    folder.write(*names, "other.py")
    folder.write(
        "package/__pycache__/x.pyc", "package/env/pyvenv.cfg", "package/env/x.py", "package/.env", "package/.git/x"
    )
    (folder.path / "package" / "__init__.py").write_text("import other")
    assert folder.names() == ["handler.py", "other.py", *names]


def test_folders_without_init_give_what_is_imported(folder):
    """Of a namespace package only the modules that are imported are taken."""
    folder.handler("from tools import one\nimport tools.two")
    folder.write("tools/one.py", "tools/two.py", "tools/three.py")
    assert folder.names() == ["handler.py", "tools/one.py", "tools/two.py"]


def test_declared_files_and_patterns_are_taken(folder):
    """What ``files=`` spells out and what ``include`` matches is taken, folders with all that is in them."""
    folder.handler(options=", files={'v': 'assets/v.txt', 'gone': 'not/there.txt'}")
    folder.write("assets/v.txt", "assets/w.txt", "data/deep/x.bin", "data/y.bin")
    assert folder.names() == ["assets/v.txt", "handler.py"]
    assert folder.names("data") == ["assets/v.txt", "data/deep/x.bin", "data/y.bin", "handler.py"]
    assert folder.names("./data/") == folder.names("data")
    assert folder.names("**/*.bin", "assets/*") == [
        "assets/v.txt", "assets/w.txt", "data/deep/x.bin", "data/y.bin", "handler.py",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("nothing/*", "include 'nothing/*' matches nothing in"),
        ("../other/*", "leads out of"),
        ("/etc/*", "leads out of"),
        (".env", "matches nothing in .* (hidden files and caches are never taken)"),
    ],
)
def test_patterns_that_take_nothing_or_too_much_are_refused(folder, pattern, message):
    """A pattern that matches nothing, hidden files only, or leads out is an error."""
    folder.handler()
    (folder.path / ".env").write_text("TOKEN=1")
    with pytest.raises(HandlerError, match=re.escape(message).replace(r"\.\*", ".*")):
        folder.names(pattern)


def test_modules_from_elsewhere_are_refused(folder, monkeypatch):
    """A local module outside the folder cannot be in the image: the error says where it is and what to do."""
    outside = folder.path.parent / "library"
    outside.mkdir()
    (outside / "helper.py").write_text("")
    monkeypatch.syspath_prepend(str(outside))
    folder.handler("import helper")
    with pytest.raises(
        HandlerError, match=r"the module 'helper', imported by .*handler.py, is at .*helper.py, which is outside"
    ):
        folder.names()


def test_links_that_lead_out_are_refused(folder):
    """A link is followed inside the folder and refused when it leads out of it; links to folders are not followed."""
    secret = folder.path.parent / "secret.txt"
    secret.write_text("s")
    folder.write("data/a.txt", "kept/b.txt")
    folder.handler()
    (folder.path / "data" / "link.txt").symlink_to(folder.path / "kept" / "b.txt")
    assert folder.names("data") == ["data/a.txt", "data/link.txt", "handler.py"]
    (folder.path / "data" / "out.txt").symlink_to(secret)
    with pytest.raises(HandlerError, match=r"out.txt, which leads to .*secret.txt, which is outside"):
        folder.names("data")
    (folder.path / "data" / "out.txt").unlink()
    (folder.path / "data" / "folder").symlink_to(folder.path / "kept")
    with pytest.raises(HandlerError, match="a link to a folder, which is not copied"):
        folder.names("data")


def test_a_dangling_link_is_refused(folder):
    """A link that leads nowhere is an error, not a hole in the image."""
    folder.write("data/a.txt")
    folder.handler()
    (folder.path / "data" / "gone.txt").symlink_to(folder.path / "nowhere.txt")
    with pytest.raises(HandlerError, match="which is no file: leave it out, or mend the link"):
        folder.names("data")


def test_a_folder_behind_a_link_is_like_any_other(folder):
    """The handler's folder may itself be reached through a link."""
    folder.handler("import helper")
    folder.write("helper.py")
    alias = folder.path.parent / "alias"
    alias.symlink_to(folder.path)
    assert Folder(alias).names() == ["handler.py", "helper.py"]


def test_too_much_is_refused_by_name(folder, monkeypatch):
    """More than the limit is an error that names the largest files and says where weights belong."""
    monkeypatch.setattr(module, "MOST_BYTES", 1 << 20)
    folder.handler()
    folder.write("data/small.bin", "data/big.bin")
    (folder.path / "data" / "big.bin").write_bytes(bytes(2 << 20))
    with pytest.raises(HandlerError, match=r"are 2 MiB, more than 1 MiB; the largest: data/big.bin \(2 MiB\)"):
        folder.names("data")


def test_coldstart_itself_is_never_a_source(folder):
    """The handler's imports of coldstart bring none of its files, wherever it runs from."""
    folder.handler("import coldstart.stores\nfrom coldstart.testing import check")
    assert folder.names() == ["handler.py"]
