"""Deploying to Modal: the generated file, what it says about the handler, and what is refused before Modal sees it."""

from __future__ import annotations

import argparse
import ast
import textwrap

import pytest

from coldstart.cli import main
from coldstart.deploy.modal import app_file, class_name, make_plan
from coldstart.deploy.options import overridden
from coldstart.deploy.shape import read_shape
from coldstart.errors import ConfigError, HandlerError
from coldstart.script import read_script

HANDLER = """
# /// script
# requires-python = ">=3.12"
# dependencies = ["torch>=2.6"]
# [tool.coldstart]
# gpu = ["L4", "A10G"]
# apt = ["ffmpeg"]
# env = {LEVEL = "low"}
# min_workers = 1
# [tool.coldstart.modal]
# snapshot = "cpu"
# volume = "weights"
# ///
import a_package_that_is_not_installed_here
from coldstart import coldstart

@coldstart("all-minilm.v2", load=lambda: 1, env=["SIZE"], secrets=["TOKEN"], concurrency=3)
async def handler(event, model):
    yield model
"""

STORE = {
    "COLDSTART_STORE": "s3://bucket/prefix",
    "AWS_ACCESS_KEY_ID": "an-access-key",
    "AWS_SECRET_ACCESS_KEY": "a-secret-key",
}


@pytest.fixture
def path(tmp_path):
    """A handler's file that cannot be imported where it is deployed from."""
    file = tmp_path / "handler.py"
    file.write_text(textwrap.dedent(HANDLER).lstrip())
    return str(file)


def options(**given):
    """The command's options, as its parser leaves them."""
    unset = ("name", "gpu", "concurrency", "min_workers", "max_workers", "idle_seconds", "snapshot", "web")
    return argparse.Namespace(**{**dict.fromkeys(unset), **given})


def plan_of(path, environment, **given):
    """The plan of the file in an environment."""
    return make_plan(
        path, read_shape(path), overridden(read_script(path), options(**given)), options(**given), environment
    )


def test_the_plan_says_what_the_file_says(path):
    """Kind, concurrency, image, GPU and snapshot come from the file, which is not imported."""
    plan = plan_of(path, {**STORE, "TOKEN": "tok", "SIZE": "small"})
    assert plan["app"] == "all-minilm.v2"
    assert plan["class"] == "AllMinilmV2"
    assert plan["handler"] == {
        "file": "handler.py",
        "name": "all-minilm.v2",
        "kind": "async_generator",
        "methods": {},
    }
    assert (plan["concurrency"], plan["modal_snapshot"], plan["python"]) == (3, "cpu", "3.12")
    assert plan["apt"] == ["ffmpeg"]
    assert "torch>=2.6" in plan["pip"]
    assert any(line.startswith("boto3") for line in plan["pip"])
    assert not any(line.startswith("runpod") for line in plan["pip"])
    assert plan["options"] == {
        "gpu": ["L4", "A10G"],
        "timeout": 300,
        "scaledown_window": 30,
        "min_containers": 1,
        "max_containers": 3,
    }
    assert plan["volume"] == "weights"
    assert [name for _, name in plan["files"]] == ["handler.py"]


def test_the_command_line_wins(path):
    """Every option of the command replaces what the file says."""
    plan = plan_of(
        path,
        {**STORE, "TOKEN": "tok"},
        name="other",
        gpu=["H100"],
        concurrency=7,
        min_workers=0,
        max_workers=9,
        idle_seconds=5,
        snapshot="gpu",
        web="POST",
    )
    assert (plan["app"], plan["concurrency"], plan["modal_snapshot"], plan["web"]) == ("other", 7, "gpu", "POST")
    assert plan["env"]["COLDSTART_CONCURRENCY"] == "7"
    assert plan["options"]["gpu"] == "H100"
    assert (plan["options"]["min_containers"], plan["options"]["max_containers"]) == (0, 9)
    assert plan["options"]["scaledown_window"] == 5
    assert any(line.startswith("fastapi") for line in plan["pip"])


def test_no_secret_value_is_in_the_generated_file(path):
    """The file has the names of secret variables; plain settings are in it with their values."""
    text = app_file(plan_of(path, {**STORE, "TOKEN": "a-planted-token", "SIZE": "small"}))
    for value in ("a-planted-token", "an-access-key", "a-secret-key"):
        assert value not in text
    for name in ("TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert repr(name) in text
    assert "'SIZE': 'small'" in text
    assert "'COLDSTART_STORE': 's3://bucket/prefix'" in text


def test_the_generated_file_reads_back_as_the_plan(path):
    """What the container reads is what was planned here."""
    plan = plan_of(path, {**STORE, "TOKEN": "tok"})
    tree = ast.parse(app_file(plan))
    values = [node.value for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)]
    assert [ast.literal_eval(value) for value in values] == [plan]


def test_missing_secrets_are_listed_unless_modal_has_them(path, tmp_path):
    """Declared secrets that are not set here are an error that names them all, except where Modal secrets are named."""
    with pytest.raises(ConfigError, match="TOKEN") as raised:
        plan_of(path, STORE)
    assert "[tool.coldstart.modal]" in str(raised.value)
    text = (tmp_path / "handler.py").read_text().replace('# snapshot = "cpu"', '# secrets = ["mine"]')
    (tmp_path / "handler.py").write_text(text)
    plan = plan_of(path, STORE)
    assert plan["secrets"] == ["mine"]
    assert "TOKEN" not in plan["variables"]


@pytest.mark.parametrize("store", [{}, {"COLDSTART_STORE": "file:///folder"}])
def test_a_store_that_containers_do_not_share_is_refused(path, store):
    """Without a store in S3 or R2 no container would find another's snapshot, and that is said."""
    with pytest.raises(ConfigError, match="containers of Modal share none"):
        plan_of(path, {**store, "TOKEN": "tok"})


@pytest.mark.parametrize(
    ("missing", "store"),
    [("AWS_SECRET_ACCESS_KEY", "s3://bucket/prefix"), ("COLDSTART_R2_ACCOUNT_ID", "r2://bucket/prefix")],
)
def test_a_store_that_containers_could_not_reach_is_refused(path, missing, store):
    """Containers have no credentials but those they are given: what is missing is said before anything is sent."""
    environment = {**STORE, "COLDSTART_STORE": store, "COLDSTART_R2_ACCOUNT_ID": "account", "TOKEN": "tok"}
    plan_of(path, environment)
    del environment[missing]
    with pytest.raises(ConfigError, match=missing):
        plan_of(path, environment)


@pytest.mark.parametrize("name", ["TOKEN", "COLDSTART_SECRET_ACCESS_KEY"])
def test_a_secret_that_stands_in_the_file_is_refused(path, tmp_path, name):
    """A value in the block would be in the image and in the generated file, for everybody to read."""
    text = (tmp_path / "handler.py").read_text().replace('env = {LEVEL = "low"}', f'env = {{{name} = "planted"}}')
    (tmp_path / "handler.py").write_text(text)
    with pytest.raises(HandlerError, match=f"{name} is secret") as raised:
        plan_of(path, {**STORE, "TOKEN": "tok"})
    assert "planted" not in str(raised.value)


def test_no_store_at_all_can_be_meant(path):
    """``off`` deploys without snapshots of ours."""
    assert plan_of(path, {"COLDSTART_STORE": "off", "TOKEN": "tok"})["env"]["COLDSTART_STORE"] == "off"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("minilm", "Minilm"),
        ("all-minilm.v2", "AllMinilmV2"),
        ("7b_chat", "Handler7bChat"),
        ("MyModel", "MyModel"),
        ("none", "HandlerNone"),  # the others would be keywords
        ("true", "HandlerTrue"),
    ],
)
def test_class_names(name, expected):
    """A handler's name becomes the name of a class, an identifier."""
    assert class_name(name) == expected
    assert class_name(name).isidentifier()


def test_a_dry_run_prints_the_file_and_the_command(path, monkeypatch, capsys):
    """Nothing is deployed; what would be is printed, whole."""
    for name, value in {**STORE, "TOKEN": "a-planted-token"}.items():
        monkeypatch.setenv(name, value)
    assert main(["deploy", "modal", path, "--dry-run", "--environment", "dev"]) == 0
    printed = capsys.readouterr().out
    assert "app, AllMinilmV2 = deployed(__name__, PLAN)" in printed
    assert "# would run: modal deploy " in printed
    assert "--env dev" in printed
    assert "a-planted-token" not in printed


def test_the_file_can_be_kept(path, tmp_path, monkeypatch, capsys):
    """``--write`` leaves the file to whoever wants to own it, and deploys nothing."""
    for name, value in {**STORE, "TOKEN": "tok"}.items():
        monkeypatch.setenv(name, value)
    assert main(["deploy", "modal", path, "--write", str(tmp_path / "app.py")]) == 0
    assert "deployed(__name__, PLAN)" in (tmp_path / "app.py").read_text()
    assert "modal deploy" in capsys.readouterr().out


def test_deleting_stops_the_app(path, capsys):
    """``--delete`` stops the app of the handler's name and needs no secrets for it."""
    assert main(["deploy", "modal", path, "--delete", "--dry-run"]) == 0
    assert capsys.readouterr().out == "# would run: modal app stop --yes all-minilm.v2\n"


# --- files with an app of their own ----------------------------------------------------------------------------------

OWN = """
import modal
from coldstart import coldstart
from coldstart.adapters.modal import service

app = modal.App("own")

@coldstart("one", load=lambda: 1)
def handler(event, model):
    return model

{made}
"""


@pytest.fixture
def own(tmp_path, forgotten_imports):
    """Writes a file that makes its own app, of a module name of its own."""
    pytest.importorskip("modal")

    def write(made, name):
        file = tmp_path / f"{name}.py"
        file.write_text(OWN.format(made=textwrap.dedent(made)))
        return str(file)

    return write


def test_a_file_of_its_own_is_deployed_as_it_is(own, capsys):
    """Where the file makes an app, the file itself is what Modal gets."""
    path = own('Model = service(app, handler, name="Model")', "own_right")
    assert main(["deploy", "modal", path, "--dry-run"]) == 0
    assert capsys.readouterr().out == f"# would run: modal deploy {path}\n"


@pytest.mark.parametrize("words", [["--gpu", "L4"], ["--min-workers", "0"], ["--web", "POST"], ["--write", "app.py"]])
def test_what_a_file_of_its_own_says_itself_is_refused(own, capsys, words):
    """Options of a generated app are refused where the file makes the app, rather than left out silently."""
    path = own('Model = service(app, handler, name="Model")', "own_options")
    assert main(["deploy", "modal", path, *words, "--dry-run"]) == 1
    assert f"{words[0]}: {path} makes its own app" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ('Other = service(app, handler, name="Model")', "no variable 'Model'"),
        ('service(app, handler, name="Model")', "no variable 'Model'"),
        ('Model = service(app, handler, name="not a name")', "cannot name a class"),
        ('Model = service(app, handler, name="Model", modal_snapshot="disk")', "off, cpu, gpu"),
        ('Model = service(app, handler, name="Model", enable_memory_snapshot=True)', "modal_snapshot="),
        ('Model = service(app, handler, name="Model", web="PUT")', "'GET', 'POST'"),
        ('Model = service(app, handler.run, name="Model")', "is not a handler"),
        ('Model = coldstart("two", load=lambda: 1)(app.function()(handler.run))', "below decorators of platforms"),
    ],
)
def test_what_modal_would_tell_only_in_the_container_is_told_here(own, capsys, made, said, request):
    """Names that do not match, wrong orders of decorators and options that cannot work fail before anything is deployed."""
    name = "own_" + "".join(character for character in request.node.name if character.isalnum())
    assert main(["deploy", "modal", own(made, name[:60]), "--dry-run"]) == 1
    assert said in capsys.readouterr().err


def test_a_decorated_handler_can_still_be_run_here(tmp_path, own, capsys):
    """``@service`` above ``@coldstart`` gives the class the function's name, and ``coldstart run`` still finds the handler."""
    path = own(
        """
        @service(app)
        @coldstart("two", load=lambda: 2)
        def Two(event, model):
            return model * event["input"]
        """,
        "own_decorated",
    )
    assert main(["deploy", "modal", path, "--dry-run"]) == 0
    capsys.readouterr()
    assert main(["run", f"{path}:two", "--input", "21", "--no-wait"]) == 0
    assert capsys.readouterr().out.strip() == "42"
