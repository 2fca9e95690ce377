"""Finding and importing a handler's file: by path, once, with errors that say what to do."""

from __future__ import annotations

import sys

import pytest

from coldstart.errors import EventError, HandlerError
from coldstart.loading import Target, check_event, choose_handler, handlers_of, import_file, parse_target, prepare_path

ONE = """
from coldstart import coldstart

@coldstart("one", load=lambda: 1)
def first(event, model):
    return model
"""
TWO = (
    ONE
    + """
@coldstart("two", load=lambda: 2)
def second(event, model):
    return model
"""
)


pytestmark = pytest.mark.usefixtures("forgotten_imports")


@pytest.fixture
def write(tmp_path):
    """Writes a file and returns its path."""

    def to_file(text, name="handler_of_test.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return to_file


# --- targets ---------------------------------------------------------------------------------------------------------


def test_targets_have_an_absolute_path_and_perhaps_a_name(write, tmp_path, monkeypatch):
    """``FILE`` and ``FILE:NAME`` are told apart, and later changes of the folder change nothing."""
    path = write(ONE)
    monkeypatch.chdir(tmp_path)
    assert parse_target("handler_of_test.py") == Target(path, None)
    assert parse_target(f"{path}:one") == Target(path, "one")
    assert parse_target(f"{path}:") == Target(path, None)


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("absent.py", r"no file is at 'absent.py' \(looked from .*\): check the path"),
        ("folder.py", r"no file is at 'folder.py'"),
        ("notes.txt", r"'notes.txt' is not a Python file; give the path of a handler's file"),
        ("handlers", r"'handlers' is not a Python file"),
        ("", r"'' is not a Python file"),
    ],
)
def test_targets_that_are_no_file_are_told(target, text, tmp_path, monkeypatch):
    """A wrong path is a HandlerError that says where it was looked for, or what a handler's file is."""
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HandlerError, match=text):
        parse_target(target)


# --- importing -------------------------------------------------------------------------------------------------------


def test_a_file_is_imported_once(write):
    """Importing a file again gives the same module, so its handlers find their running worker."""
    path = write(ONE)
    module = import_file(path)
    assert module.__name__ == "handler_of_test"
    assert sys.modules["handler_of_test"] is module is import_file(path)


def test_a_file_named_like_a_module_is_no_danger_to_it(write):
    """A handler in ``json.py`` is imported under another name, and ``import json`` stays what it was."""
    import json

    module = import_file(write(ONE, "json.py"))
    assert module.__name__ == "_coldstart_handler_json"
    assert list(handlers_of(module)) == ["first"]
    assert sys.modules["json"] is json


def test_a_dash_in_the_name_is_no_obstacle(write):
    """``my-model.py``, which no import statement could name, is imported by its path."""
    assert import_file(write(ONE, "my-model-of-test.py")).__name__ == "my_model_of_test"


def test_neighbours_can_be_imported(write):
    """After ``prepare_path`` the file imports what lies beside it, as when Python runs the file itself."""
    write("VALUE = 3", "neighbour_of_test.py")
    path = write("from neighbour_of_test import VALUE")
    prepare_path(path)
    prepare_path(path)
    assert import_file(path).VALUE == 3
    assert sys.path.count(str(sys.path[0])) == 1


def test_a_dotted_name_is_used_where_it_leads_to_the_file(write, tmp_path):
    """A module of a package keeps its name, so that its relative imports work in another process too."""
    write("", "package_of_test/__init__.py")
    write("VALUE = 3", "package_of_test/values.py")
    path = write("from .values import VALUE", "package_of_test/handler.py")
    sys.path.insert(0, str(tmp_path))
    assert import_file(path, module="package_of_test.handler").__name__ == "package_of_test.handler"


@pytest.mark.parametrize("name", ["json", "absent_of_test.handler", "__main__"])
def test_a_dotted_name_of_another_module_is_not_used(name, write):
    """A name that leads elsewhere, or nowhere, is passed over: the path decides."""
    assert import_file(write(ONE), module=name).__name__ == "handler_of_test"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = 1\ny = (\n", r"handler_of_test.py:2: not valid Python: '\(' was never closed"),
        (b"x = '\xe9'\n", r"handler_of_test.py:1: not valid Python: .*utf-8"),
        (b"x = 1\0\n", r"handler_of_test.py:1: not valid Python: source code string cannot contain null bytes"),
    ],
)
def test_a_file_that_is_not_python_is_told_with_its_line(text, told, write):
    """A syntax error is a HandlerError with file and line."""
    with pytest.raises(HandlerError, match=told):
        import_file(write(text))


def test_a_syntax_error_of_a_neighbour_names_the_neighbour(write):
    """The file in the message is the one that is wrong, not the one that imports it."""
    write("x = (", "broken_of_test.py")
    path = write("import broken_of_test")
    prepare_path(path)
    with pytest.raises(HandlerError, match=r"broken_of_test.py:1: not valid Python"):
        import_file(path)


def test_errors_of_the_file_pass_and_leave_no_half_module(write):
    """What the file's own code raises is the caller's to see; the next import tries again from the beginning."""
    path = write("VALUE = 1\nimport absent_of_test")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="absent_of_test"):
            import_file(path)
        assert "handler_of_test" not in sys.modules


# --- choosing --------------------------------------------------------------------------------------------------------


def test_the_only_handler_needs_no_name(write):
    """One handler is the one that is meant, by any of its names, and a second variable for it is not a second handler."""
    path = write(ONE + "alias = first")
    module = import_file(path)
    for name in (None, "one", "first", "alias"):
        assert choose_handler(module, Target(path, name)) is module.first


@pytest.mark.parametrize(("name", "variable"), [("one", "first"), ("second", "second"), ("two", "second")])
def test_a_handler_is_chosen_by_its_name_or_its_variable(name, variable, write):
    """Among several, the handler's name and its variable's both choose."""
    path = write(TWO)
    module = import_file(path)
    assert choose_handler(module, Target(path, name)) is getattr(module, variable)


@pytest.mark.parametrize(
    ("text", "name", "told"),
    [
        ("", None, r"has no handler: decorate a function \(event, model\) with @coldstart\('name', load=...\)"),
        (TWO, None, r"has 2 handlers; choose one with FILE:NAME \(there: one, two\)"),
        (TWO, "three", r"has no handler 'three'; choose one with FILE:NAME \(there: one, two\)"),
    ],
)
def test_an_unclear_choice_is_told(text, name, told, write):
    """None, several, or an unknown one: the error says what there is and how to choose."""
    path = write(text)
    with pytest.raises(HandlerError, match=told):
        choose_handler(import_file(path), Target(path, name))


def test_imported_handlers_are_not_the_files_own(write):
    """A handler that the file takes from another one is not served from here: its code, and so its key, is there."""
    write(ONE, "elsewhere_of_test.py")
    path = write("from elsewhere_of_test import first")
    prepare_path(path)
    assert handlers_of(import_file(path)) == {}


# --- events ----------------------------------------------------------------------------------------------------------


def test_an_event_has_an_input():
    """Any mapping with an input is an event, whatever else it carries."""
    event = {"id": "1", "input": None, "webhook": "x"}
    assert check_event(event) is event


@pytest.mark.parametrize(
    ("event", "told"),
    [
        ([1], r"an event is an object with an input, such as \{\"input\": ...\}, not a list"),
        (None, r"not a NoneType"),
        ({}, r"the event has no input \(it has nothing\): send"),
        ({"inputs": 1, "id": 2}, r"the event has no input \(it has id, inputs\)"),
    ],
)
def test_what_is_no_event_is_told(event, told):
    """Anything else is an EventError that says what it has and what it needs."""
    with pytest.raises(EventError, match=told):
        check_event(event)
