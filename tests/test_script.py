"""The PEP 723 block of a handler's file, and its table of ours."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from coldstart import script as module
from coldstart.errors import HandlerError
from coldstart.script import MODAL_OPTIONS, OPTIONS, RUNPOD_OPTIONS, ModalOptions, RunpodOptions, Script, read_script

ROOT = Path(__file__).parent.parent
REFERENCE = re.compile(r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$")
"""The regular expression of the specification (PEP 723)."""


def read(folder, text):
    """The script of a file with this text."""
    path = folder / "handler.py"
    path.write_text(text)
    return read_script(str(path))


def block(toml):
    """A block with this TOML."""
    lines = ["# /// script", *(f"# {line}" if line else "#" for line in toml.split("\n")), "# ///"]
    return "\n".join(lines) + "\n"


def ours(toml, folder):
    """The script of a file whose ``[tool.coldstart]`` is this."""
    return read(folder, block(f"[tool.coldstart]\n{toml}"))


def test_a_file_without_a_block_has_all_defaults(tmp_path):
    """Without a block every field is the default that its table documents."""
    script = read(tmp_path, "import math\n")
    assert script.python == ""
    assert script.dependencies == script.gpu == script.apt == ()
    assert (script.gpu_count, script.concurrency, script.min_workers, script.max_workers) == (1, 0, 0, 3)
    for fields, options in ((script, OPTIONS), (script.runpod, RUNPOD_OPTIONS), (script.modal, MODAL_OPTIONS)):
        assert {key: getattr(fields, key) for key in options} == {
            key: option.default for key, option in options.items()
        }


def test_every_field_has_a_line_in_its_table():
    """The tables and the types name the same keys, and each key is documented."""
    assert (*OPTIONS,) == Script._fields[2:-2]
    assert (*RUNPOD_OPTIONS,) == RunpodOptions._fields
    assert (*MODAL_OPTIONS,) == ModalOptions._fields
    tables = (OPTIONS, RUNPOD_OPTIONS, MODAL_OPTIONS)
    assert all(option.doc and option.allowed for table in tables for option in table.values())


def test_a_whole_block_is_read(tmp_path):
    """Everything that a block can say arrives, in the types that the fields promise."""
    script = read(
        tmp_path,
        block(
            'requires-python = ">=3.12"\ndependencies = ["torch>=2.6", "tokenizers"]\n\n'
            '[tool.coldstart]\napt = ["ffmpeg"]\ninclude = ["assets/**"]\ngpu = ["H100", "A100"]\ngpu_count = 2\n'
            "concurrency = 4\ntimeout_seconds = 60\nmin_workers = 1\nmax_workers = 5\nidle_seconds = 9\n"
            'env = {MODEL = "small"}\n'
            '[tool.coldstart.runpod]\ngpu = "ADA_24"\ndisk_gb = 50\nflashboot = "priority"\nnetwork_volumes = ["v1"]\n'
            'data_centers = ["EU-RO-1"]\nregistry = "reg1"\nrefresh_worker = true\nreturn_aggregate_stream = false\n'
            'secrets = {TOKEN = "hf"}\n'
            '[tool.coldstart.modal]\ngpu = "H100!"\nsnapshot = "gpu"\nsecrets = ["s"]\nvolume = "v"\nregion = "us-east"\n'
            'web = "POST"'
        ),
    )
    assert script == Script(
        "3.12", ("torch>=2.6", "tokenizers"), ("ffmpeg",), ("assets/**",), ("H100", "A100"), 2, 4, {"MODEL": "small"},
        60, 1, 5, 9,
        RunpodOptions(("ADA_24",), 50, "priority", ("v1",), ("EU-RO-1",), "reg1", True, False, {"TOKEN": "hf"}),
        ModalOptions(("H100!",), "gpu", ("s",), "v", "us-east", "POST"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("gpus = 1", "tool.coldstart.gpus is not a key of the block: did you mean gpu"),
        ("max_worker = 1", "did you mean max_workers?"),
        ("zzz = 1", "there are apt, include"),
        (
            "[tool.coldstart.runpod]\nflash = 1",
            "tool.coldstart.runpod.flash is not a key of the block: did you mean flashboot?",
        ),
        ("[tool.coldstart.modal]\nsnapshots = 1", "did you mean snapshot?"),
        ("gpu = 1", "tool.coldstart.gpu=1 has to be a GPU or a list"),
        ("gpu_count = 0", "a whole number from 1 to 8"),
        ("gpu_count = true", "gpu_count=True has to be a whole number"),
        ('max_workers = "3"', "max_workers='3' has to be a whole number"),
        ("idle_seconds = 9.5", "a whole number from 2 to 3600"),
        ("apt = ['a; rm']", "apt=['a; rm'] has to be a list of Debian packages"),
        ("env = {A = 1}", "tool.coldstart.env={...} has to be a table of texts"),
        ("env = {'A-B' = 'x'}", "a table of texts"),
        ("runpod = 1", "tool.coldstart.runpod has to be a table, not 1"),
        ("[tool.coldstart.runpod]\nflashboot = 'yes'", '"off" or "on" or "priority"'),
        ("[tool.coldstart.runpod]\nrefresh_worker = 1", "true or false"),
        ("min_workers = 4", "min_workers=4 is more than max_workers=3"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, toml, message):
    """Unknown keys, wrong types and values out of range are errors that name the file, the key and what is allowed."""
    with pytest.raises(HandlerError) as caught:
        ours(toml, tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path / "handler.py") in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (block("name = 1"), "name is not a key of the block: there are requires-python"),
        (block("dependencies = 'torch'"), "dependencies='torch' has to be a list of requirements"),
        (block("tool = 1"), "tool has to be a table"),
        (block("x = = 1"), "is not TOML"),
        (block("x=1") + "\n" + block("y=1"), "2 blocks '# /// script'"),
    ],
)
def test_a_broken_block_is_refused(tmp_path, text, message):
    """A block that is no block, or is there twice, is an error that says so."""
    with pytest.raises(HandlerError, match=re.escape(message)):
        read(tmp_path, text)


def test_a_secret_in_the_wrong_place_is_not_repeated(tmp_path):
    """The refusal of a table of variables does not show its values."""
    with pytest.raises(HandlerError) as caught:
        ours('env = {TOKEN = ["hunter2"]}', tmp_path)
    assert "hunter2" not in str(caught.value)


def test_other_tools_have_the_block_too(tmp_path):
    """Tables of other tools in the block are nobody's business here."""
    assert read(tmp_path, block("[tool.uv]\nexclude-newer = 1")) == read(tmp_path, "")


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    """A path that leads nowhere is an error that names it."""
    with pytest.raises(HandlerError, match=r"cannot read .*nothing\.py"):
        read_script(str(tmp_path / "nothing.py"))


def test_bytes_that_are_not_utf8_are_an_error(tmp_path):
    """A file in another encoding says where it stops being UTF-8; without a block nobody needs to know."""
    path = tmp_path / "handler.py"
    path.write_bytes(b"# caf\xe9\n" + block("x=1").encode())
    with pytest.raises(HandlerError, match=r"is not UTF-8 \(byte 5\)"):
        read_script(str(path))
    path.write_bytes(b"# caf\xe9\n")
    assert read_script(str(path)).gpu == ()


def test_windows_line_ends_and_a_byte_order_mark_are_read(tmp_path):
    """What editors on Windows write is read like the rest."""
    path = tmp_path / "handler.py"
    path.write_bytes(b"\xef\xbb\xbf" + block('[tool.coldstart]\ngpu = "L4"').replace("\n", "\r\n").encode())
    assert read_script(str(path)).gpu == ("L4",)


LINES = st.lists(
    st.sampled_from(["# /// script", "# ///", "#", "# a = 1", "#b", "x = 1", "", "# /// other", "    # ///"]),
    max_size=12,
)


@given(LINES)
@example(["# /// script", "# a = 1", "# ///", "# b", "# ///", ""])
@example(["# /// script", "# ///", "# ///"])
@example(["# /// other", "# /// script", "# a = 1", "# ///"])
@example(["# /// script", "# ///", "", "# /// script", "# a = 1", "# ///"])
def test_blocks_are_found_as_the_specification_finds_them(lines):
    """The blocks of any arrangement of comment lines are those of the specification's regular expression."""
    text = "\n".join(lines) + "\n"
    wanted = [match["content"] for match in REFERENCE.finditer(text) if match["type"] == "script"]
    assert ["".join(f"{line}\n" for line in each) for each in module._blocks(text.split("\n"))] == wanted


@pytest.mark.parametrize(
    ("requirement", "python"),
    [
        (">=3.11", "3.11"), (">=3.12", "3.12"), (">3.11", "3.11"), (">3.11.4,<3.13", "3.11"), ("==3.12.*", "3.12"),
        ("~=3.12", "3.12"), ("~=3.12.1", "3.12"), (">=3.9", "3.11"), ("<3.13,>=3.12.4", "3.12"), ("!=3.11.*", "3.12"),
        ("<=3.12", "3.11"), (">= 3.13", "3.13"), (">3", "3.11"), (">=3", "3.11"), ("~=3.11", "3.11"),
    ],
)  # fmt: skip
def test_the_lowest_python_that_fits_is_chosen(tmp_path, requirement, python):
    """Of the supported minor versions, the lowest whose newest patch satisfies the requirement is the image's."""
    assert read(tmp_path, block(f'requires-python = "{requirement}"')).python == python


@pytest.mark.parametrize(
    ("requirement", "message"),
    [
        (">=3.14", "fits no newest patch of Python 3.11, 3.12, 3.13"),
        ("==3.12", 'write ">=3.12" or "==3.12.*"'),
        ("==3.12.4", "fits no newest patch"),
        ("3.12", "has to be versions"),
        (">=3.12 || <3", "has to be versions"),
    ],
)
def test_a_python_that_no_image_has_is_refused(tmp_path, requirement, message):
    """A requirement that no image can meet, or that is none, is an error with a way out."""
    with pytest.raises(HandlerError, match=re.escape(message)):
        read(tmp_path, block(f'requires-python = "{requirement}"'))


def test_a_file_without_a_block_costs_no_parser(tmp_path):
    """A worker whose file has no block does not import a TOML parser to find that out."""
    path = tmp_path / "handler.py"
    path.write_text("x = 1\n")
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        f"from coldstart.script import read_script; read_script({str(path)!r})\n"
        "import json as j; print(j.dumps(sorted({'tomllib', 'difflib', 'dataclasses', 'inspect'} & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_the_docstring_shows_a_block_that_works(tmp_path):
    """The example of the module's own documentation is a block that is read."""
    shown = re.search(r"    # /// script\n.*?    # ///\n", module.__doc__, re.DOTALL)
    script = read(tmp_path, re.sub(r"(?m)^    ", "", shown[0]))
    assert (script.python, script.gpu, script.max_workers, script.runpod.flashboot) == ("3.12", ("L4",), 5, "priority")
