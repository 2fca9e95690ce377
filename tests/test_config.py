"""Settings: reading, sources, masking, and agreement of the light reader with the strict pydantic model."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from coldstart import config
from coldstart.cli import config as command
from coldstart.errors import ConfigError
from coldstart.strict_settings import problems, strict_model
from coldstart.terms import PHASES, SKIPPABLE_PHASES

HOME = {"HOME": "/home/ada"}
SECRETS = {
    "COLDSTART_ACCESS_KEY_ID": "AKIAPLANTED",
    "COLDSTART_SECRET_ACCESS_KEY": "planted/secret+value",
    "COLDSTART_SESSION_TOKEN": "planted-token",
}
SETTINGS = {setting.field: setting for setting in config.SETTINGS}


def test_without_any_variable_all_values_are_defaults():
    """An empty environment gives the documented defaults, each with the source ``default``."""
    settings = config.load(HOME)
    assert settings.store == "file:///home/ada/.cache/coldstart"
    assert settings.files_folder == "/home/ada/.cache/coldstart-files"
    assert (settings.device, settings.log, settings.log_level, settings.codec) == ("auto", "console", "info", "auto")
    assert (settings.zstd_level, settings.fetch_threads, settings.memory_budget_bytes) == (1, 64, 192 << 20)
    assert (settings.capture, settings.start_records) == (True, True)
    assert settings.fresh is False
    assert (settings.capture_wait_seconds, settings.capture_idle_seconds) == (60.0, 0.25)
    assert settings.skip_phases == ()
    assert {source.kind for source in settings.sources.values()} == {config.DEFAULT}


def test_the_class_has_the_fields_of_the_table():
    """Settings and SETTINGS name the same fields in the same order, and every field has a source."""
    assert (*SETTINGS, "sources") == config.Settings._fields
    assert list(config.load(HOME).sources) == list(SETTINGS)


@pytest.mark.parametrize("setting", config.SETTINGS, ids=lambda setting: setting.field)
def test_a_default_is_a_value_that_could_be_given(setting):
    """Every default has the type and range of its setting: written as text it reads back as itself."""
    default = config.default_of(setting, HOME)
    assert getattr(config.load(HOME, **{setting.field: default}), setting.field) == default
    assert setting.variable == f"COLDSTART_{setting.field.upper()}"


@pytest.mark.parametrize(
    ("variable", "text", "field", "value"),
    [
        ("COLDSTART_STORE", "r2://bucket/prefix", "store", "r2://bucket/prefix"),
        ("COLDSTART_STORE", "/data/snapshots", "store", "/data/snapshots"),
        ("COLDSTART_STORE", "memory://", "store", "memory://"),
        ("COLDSTART_DEVICE", "cuda:1", "device", "cuda:1"),
        ("COLDSTART_FRESH", "True", "fresh", True),
        ("COLDSTART_CAPTURE", "off", "capture", False),
        ("COLDSTART_LOG", "JSON", "log", "json"),
        ("COLDSTART_LOG", "off", "log", "off"),
        ("COLDSTART_ZSTD_LEVEL", " 19\n", "zstd_level", 19),
        ("COLDSTART_MEMORY_BUDGET_BYTES", "256MiB", "memory_budget_bytes", 256 << 20),
        ("COLDSTART_MEMORY_BUDGET_BYTES", "1 GiB", "memory_budget_bytes", 1 << 30),
        ("COLDSTART_MEMORY_BUDGET_BYTES", "2gb", "memory_budget_bytes", 2_000_000_000),
        ("COLDSTART_MEMORY_BUDGET_BYTES", "1048576", "memory_budget_bytes", 1 << 20),
        ("COLDSTART_CAPTURE_IDLE_SECONDS", "0.125", "capture_idle_seconds", 0.125),
        (
            "COLDSTART_SKIP_PHASES",
            "custom_init, pool_alloc,custom_init",
            "skip_phases",
            ("pool_alloc", "custom_init"),
        ),
        ("COLDSTART_SKIP_PHASES", ",".join(reversed(SKIPPABLE_PHASES)), "skip_phases", SKIPPABLE_PHASES),
        ("COLDSTART_R2_ACCOUNT_ID", "0123456789abcdef0123456789abcdef", "r2_account_id", "0123456789abcdef" * 2),
        ("AWS_DEFAULT_REGION", "eu-central-1", "region", "eu-central-1"),
    ],
)
def test_a_variable_is_read(variable, text, field, value):
    """A variable's text becomes a value of the field's type, and the source names the variable."""
    settings = config.load({**HOME, variable: text})
    assert getattr(settings, field) == value
    assert type(getattr(settings, field)) is type(value)
    assert settings.sources[field] == config.Source(config.ENVIRONMENT, variable)


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("COLDSTART_STORE", "snapshots"),
        ("COLDSTART_STORE", "s3://bucket\n/prefix"),
        ("COLDSTART_DEVICE", "tpu"),
        ("COLDSTART_DEVICE", "cuda:"),
        ("COLDSTART_FRESH", "maybe"),
        ("COLDSTART_LOG_LEVEL", "trace"),
        ("COLDSTART_ZSTD_LEVEL", "20"),
        ("COLDSTART_ZSTD_LEVEL", "0"),
        ("COLDSTART_ZSTD_LEVEL", "1_0"),
        ("COLDSTART_MEMORY_BUDGET_BYTES", "1.5GiB"),
        ("COLDSTART_MEMORY_BUDGET_BYTES", "1KiB"),
        ("COLDSTART_CAPTURE_WAIT_SECONDS", "-1"),
        ("COLDSTART_CAPTURE_WAIT_SECONDS", "nan"),
        ("COLDSTART_SKIP_PHASES", "weight_load,"),
        ("COLDSTART_FILES_FOLDER", "files"),
        ("COLDSTART_ENDPOINT_URL", "https://host/?token=1"),
        ("COLDSTART_ENDPOINT_URL", "ftp://host"),
    ],
)
def test_a_wrong_value_is_refused_with_what_is_allowed(variable, text):
    """The error names the variable, the value and what may be given instead."""
    field = variable.removeprefix("COLDSTART_").lower()
    with pytest.raises(ConfigError) as caught:
        config.load({**HOME, variable: text})
    assert str(caught.value).startswith(f"{variable}={text!r} cannot be used")
    assert SETTINGS[field].kind.allowed in str(caught.value)


def test_a_wrong_secret_is_refused_without_being_repeated():
    """The error for an unusable credential does not hold it."""
    with pytest.raises(ConfigError, match=r"COLDSTART_SECRET_ACCESS_KEY='\*\*\*\*'") as caught:
        config.load({**HOME, **SECRETS, "COLDSTART_SECRET_ACCESS_KEY": "planted secret"})
    assert "planted" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_credentials_in_an_address_are_refused_and_masked():
    """A store address or endpoint with a user part is refused, and the user part is not in the message."""
    for variable in ("COLDSTART_STORE", "COLDSTART_ENDPOINT_URL"):
        with pytest.raises(ConfigError) as caught:
            config.load({**HOME, variable: "https://user:planted@host/x"})
        assert "planted" not in str(caught.value)
        assert "//****@host/x" in str(caught.value)


@given(st.sampled_from(sorted(SETTINGS)), st.sampled_from(["", " ", "\t\n"]))
def test_an_empty_variable_counts_as_unset(field, text):
    """A variable that is empty or blank leaves the default, whatever the setting."""
    assert config.load({**HOME, SETTINGS[field].variable: text}) == config.load(HOME)


def test_an_override_wins_over_the_environment():
    """A keyword given in code beats the variable, a None does not, and the source says so."""
    environ = {**HOME, "COLDSTART_ZSTD_LEVEL": "3", "COLDSTART_DEVICE": "cuda", "COLDSTART_SKIP_PHASES": "pool_alloc"}
    settings = config.load(environ, zstd_level=5, device=None, skip_phases=())
    assert (settings.zstd_level, settings.device, settings.skip_phases) == (5, "cuda", ())
    assert settings.sources["zstd_level"] == config.Source(config.OVERRIDE)
    assert settings.sources["device"] == config.Source(config.ENVIRONMENT, "COLDSTART_DEVICE")


@pytest.mark.parametrize(
    "overrides",
    [
        {"zstd_level": 40},
        {"zstd_level": True},
        {"store": ""},
        {"capture_wait_seconds": float("inf")},
        {"skip_phases": ["warmup"]},
        {"device": "tpu"},
    ],
    ids=str,
)
def test_a_wrong_override_is_refused(overrides):
    """An override is checked like a variable, and the error names the argument."""
    with pytest.raises(ConfigError, match=rf"^{next(iter(overrides))} \(given in code\)="):
        config.load(HOME, **overrides)


def test_an_override_of_no_setting_is_refused():
    """A misspelt keyword is an error that names the nearest setting."""
    with pytest.raises(ConfigError, match="'zstd_levle' is not a setting; did you mean zstd_level"):
        config.load(HOME, zstd_levle=3)


def test_our_credentials_win_and_are_never_mixed_with_others():
    """One COLDSTART_ credential switches the AWS_ names off for all three; region is no credential and may be borrowed."""
    aws = {
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_SESSION_TOKEN": "c",
        "AWS_REGION": "d",
        "AWS_DEFAULT_REGION": "e",
    }
    theirs = config.load({**HOME, **aws})
    assert (theirs.access_key_id, theirs.secret_access_key, theirs.session_token, theirs.region) == ("a", "b", "c", "d")
    ours = config.load({**HOME, **aws, "COLDSTART_ACCESS_KEY_ID": "x", "COLDSTART_SECRET_ACCESS_KEY": "y"})
    assert (ours.access_key_id, ours.secret_access_key, ours.session_token, ours.region) == ("x", "y", "", "d")
    given_in_code = config.load({**HOME, **aws}, access_key_id="x", secret_access_key="y")
    assert (given_in_code.secret_access_key, given_in_code.session_token) == ("y", "")


def test_half_a_pair_of_our_credentials_is_refused():
    """Our key id without our secret is an error even where AWS has one; half a pair of AWS names is left alone."""
    with pytest.raises(ConfigError, match="COLDSTART_ACCESS_KEY_ID is set and COLDSTART_SECRET_ACCESS_KEY is not"):
        config.load({**HOME, "COLDSTART_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "b"})
    assert config.load({**HOME, "AWS_ACCESS_KEY_ID": "a"}).secret_access_key == ""


def test_secrets_are_masked_wherever_settings_are_shown():
    """No secret is in repr, str or ``shown()``; what is not set is not masked."""
    settings = config.load({**HOME, **SECRETS})
    for text in (repr(settings), str(settings), f"{settings}", json.dumps(settings.shown())):
        assert not [secret for secret in SECRETS.values() if secret in text]
    assert settings.shown()["session_token"] == "****"
    assert config.load(HOME).shown()["session_token"] == ""


def test_it_can_be_told_whether_a_store_was_named():
    """``store_is_explicit`` is true for a variable or an override, false for the default; ``off`` is no store."""
    assert not config.load(HOME).store_is_explicit
    assert config.load({**HOME, "COLDSTART_STORE": "off"}).store_is_explicit
    assert config.load(HOME, store="memory://x").store_is_explicit
    assert config.load(HOME).has_store
    assert not config.load({**HOME, "COLDSTART_STORE": "off"}).has_store


def test_the_cache_folder_follows_the_xdg_rules(monkeypatch):
    """XDG_CACHE_HOME counts where it is absolute; in a file address a per cent sign is escaped, in a path it is not."""
    settings = config.load({"XDG_CACHE_HOME": "/var/100%/", **HOME})
    assert settings.store == "file:///var/100%25/coldstart"
    assert settings.files_folder == "/var/100%/coldstart-files"
    assert config.user_cache_folder({"XDG_CACHE_HOME": "relative", **HOME}) == "/home/ada/.cache"
    monkeypatch.setenv("HOME", "/home/of/the/process")
    assert config.user_cache_folder({}) == "/home/of/the/process/.cache"


def test_a_user_without_a_home_is_told_what_to_set():
    """A home folder that is no absolute path is an error, unless nothing depends on it."""
    with pytest.raises(ConfigError, match="set XDG_CACHE_HOME or HOME"):
        config.load({"HOME": "relative"})
    assert config.load({"HOME": "relative"}, store="memory://", files_folder="/f").files_folder == "/f"


def test_an_unknown_variable_is_reported_with_the_nearest_name():
    """COLDSTART_ variables that nothing reads are listed; other variables and known ones are not."""
    environ = {"COLDSTART_STROE": "x", "COLDSTART_QQQQQQQQ": "x", "COLDSTART_DEVICE": "cpu", "PATH": "/bin"}
    unknown = config.unknown_variables(environ)
    assert [(found.name, found.nearest) for found in unknown] == [
        ("COLDSTART_QQQQQQQQ", ""),
        ("COLDSTART_STROE", "COLDSTART_STORE"),
    ]
    assert [str(found) for found in unknown] == [
        "COLDSTART_QQQQQQQQ is not a setting of coldstart",
        "COLDSTART_STROE is not a setting of coldstart; did you mean COLDSTART_STORE?",
    ]


# --- the strict model is the oracle ----------------------------------------------------------------------------------

WORDS = ("auto", "off", "raw", "json", "debug", "true", "Y", "cuda", "cuda:12", "file:///a b", "s3://b/p", *PHASES)
NEAR_MISSES = st.one_of(
    st.sampled_from(WORDS),
    st.lists(st.sampled_from((*PHASES, " custom_init", "pool_alloc\t", "")), min_size=1, max_size=4).map(",".join),
    st.integers(-(10**17), 10**17).map(str),
    st.integers(-2, 100_000).map(str),
    st.floats(width=32).map(str),
    st.decimals(0, 100_000, places=3).map(str),
    st.tuples(st.integers(0, 5000), st.sampled_from(("", " ")), st.sampled_from(("B", "kB", "MiB", "gib", "TB", "Mib", "bit", "PB", "K"))).map(
        lambda parts: "".join(map(str, parts))
    ),
    st.text(max_size=20),
    st.from_regex(r"\A(https?|s3|file)://[a-z@:.?/ -]{0,20}\Z"),
)  # fmt: skip


def texts_of(setting):
    """The setting, with texts that have its form, or that of another one, or none."""
    return st.tuples(st.just(setting), st.from_regex(setting.kind.pattern, fullmatch=True) | NEAR_MISSES)


def read_lightly(setting, found):
    """What the light reader makes of a text: its value, or the message of its error."""
    try:
        return config.read(setting, found), ""
    except ConfigError as error:
        return None, str(error)


@given(st.sampled_from(config.SETTINGS).flatmap(texts_of))
@example((SETTINGS["zstd_level"], "\N{ARABIC-INDIC DIGIT THREE}"))
@example((SETTINGS["zstd_level"], "3\n"))
@example((SETTINGS["fresh"], "T"))
@example((SETTINGS["capture_wait_seconds"], "1e3"))
@example((SETTINGS["memory_budget_bytes"], "1 GiB"))
@example((SETTINGS["skip_phases"], "pool_alloc,\tcustom_init"))
@example((SETTINGS["codec"], "\N{LATIN SMALL LETTER LONG S}td"))
@example((SETTINGS["store"], "file:///a\x7f"))
def test_light_reader_and_strict_model_agree(given_text):
    """For any text of any setting, both refuse it or both accept it with equal values."""
    setting, text = given_text
    found = config.Given(text.strip(), config.Source(config.ENVIRONMENT, setting.variable))
    assume(found.text)
    value, complaint = read_lightly(setting, found)
    assert problems({setting.field: found}).get(setting.field, "") == complaint
    if not complaint:
        assert getattr(strict_model()(**{setting.field: found.text}), setting.field) == value


def test_the_strict_model_finds_every_wrong_value_at_once():
    """``problems`` lists all fields that cannot be used, where ``load`` stops at the first."""
    found = config.given({**HOME, "COLDSTART_LOG": "x", "COLDSTART_ZSTD_LEVEL": "x", "COLDSTART_DEVICE": "cpu"})
    assert sorted(problems(found)) == ["log", "zstd_level"]


# --- the environment -------------------------------------------------------------------------------------------------


def test_variables_are_set_and_removed_for_the_process(monkeypatch):
    """``set_variables`` changes this process' environment, and ``read_variable`` sees it."""
    monkeypatch.setenv("HF_HOME", "/old")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    config.set_variables({"HF_HOME": "/new", "HF_HUB_OFFLINE": None})
    assert (config.read_variable("HF_HOME"), config.read_variable("HF_HUB_OFFLINE")) == ("/new", None)
    config.set_variables({"HF_HUB_OFFLINE": None})


def test_a_child_sees_the_overrides_of_its_parent(monkeypatch):
    """What was overridden in the parent, and what is changed for the child, is in the child's environment alone."""
    monkeypatch.setenv("COLDSTART_LOG", "json")
    monkeypatch.setenv("COLDSTART_SKIP_PHASES", "pool_alloc")
    settings = config.load(fresh=True, capture_idle_seconds=0.000_000_5, skip_phases=(), store="memory://x")
    environment = config.child_environment({"HOME": None, "COLDSTART_STORE": "off"}, settings=settings)
    expected = settings._replace(store="off")
    seen = config.load({**environment, **HOME})
    assert seen[:-1] == expected[:-1]
    assert "HOME" not in environment
    assert "HOME" in os.environ
    assert "COLDSTART_FRESH" not in os.environ
    assert "COLDSTART_DEVICE" not in environment


@pytest.mark.parametrize(
    ("environ", "platform"),
    [
        ({}, "local"),
        ({"RUNPOD_ENDPOINT_ID": "e", "RUNPOD_WEBHOOK_GET_JOB": "http://x/job-take/$ID?gpu=X"}, "runpod"),
        ({"RUNPOD_POD_ID": "p"}, "local"),
        ({"RUNPOD_ENDPOINT_ID": "e", "RUNPOD_WEBHOOK_GET_JOB": ""}, "local"),
        ({"MODAL_IS_REMOTE": "1", "MODAL_TASK_ID": "ta-1"}, "modal"),
        ({"MODAL_ENVIRONMENT": "main"}, "local"),
    ],
)
def test_the_platform_is_told_by_its_variables(environ, platform):
    """A RunPod queue worker and a Modal container are recognised; a pod or a developer's machine is local."""
    assert config.platform_name(environ) == platform


# --- the command -----------------------------------------------------------------------------------------------------


def run_command(*arguments):
    """Run ``coldstart config`` in this process and return its exit status."""
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    parsed = parser.parse_args(["config", *arguments])
    return parsed.run(parsed)


def test_the_command_shows_values_and_sources(monkeypatch, capsys):
    """Every setting is printed with its value and source; secrets are masked."""
    for name, value in {**SECRETS, "COLDSTART_STORE": "s3://bucket/p", "AWS_REGION": "eu-west-1"}.items():
        monkeypatch.setenv(name, value)
    assert run_command() == 0
    output = capsys.readouterr()
    lines = {line.split()[0]: line.split()[1:] for line in output.out.splitlines()}
    assert set(lines) == {"setting", "platform", *SETTINGS}
    assert lines["store"] == ["s3://bucket/p", "COLDSTART_STORE"]
    assert lines["region"] == ["eu-west-1", "AWS_REGION"]
    assert lines["secret_access_key"] == ["****", "COLDSTART_SECRET_ACCESS_KEY"]
    assert lines["capture"] == ["true", "default"]
    assert not [secret for secret in SECRETS.values() if secret in output.out + output.err]
    assert output.err == ""


def test_the_command_reports_everything_that_is_wrong(monkeypatch, capsys):
    """All unusable values and unknown names are reported, and the exit status is 2."""
    for name, value in {"COLDSTART_LOG": "xml", "COLDSTART_ZSTD_LEVEL": "99", "COLDSTART_STROE": "x"}.items():
        monkeypatch.setenv(name, value)
    assert run_command("--json") == 2
    report = json.loads(capsys.readouterr().out)
    assert sorted(report["problems"]) == ["log", "zstd_level"]
    assert report["unknown"] == [{"name": "COLDSTART_STROE", "nearest": "COLDSTART_STORE"}]
    assert {row["setting"]: row["usable"] for row in report["settings"]}["log"] is False
    assert report["platform"] == "local"
    assert run_command() == 2
    errors = capsys.readouterr().err
    assert errors.count("coldstart: COLDSTART_") == 3


def test_the_command_reports_half_a_pair_of_credentials(monkeypatch):
    """What only the settings together can break is an error of the command too."""
    monkeypatch.setenv("COLDSTART_ACCESS_KEY_ID", "x")
    with pytest.raises(ConfigError, match="set both"):
        run_command()


def test_the_reference_lists_every_setting(capsys):
    """The Markdown table has a line for each setting, with its variable and the names it borrows."""
    assert run_command("--reference") == 0
    output = capsys.readouterr().out
    assert len(output.splitlines()) == 2 + len(SETTINGS)
    assert "| `COLDSTART_REGION`, else `AWS_REGION`, else `AWS_DEFAULT_REGION` |" in output
    assert "`file://~/.cache/coldstart`" in output


def test_settings_are_light_to_import():
    """Reading settings imports neither pydantic nor anything else from outside the standard library."""
    heavy = "{'pydantic', 'numpy', 'structlog', 'dataclasses', 'inspect', 'logging', 'asyncio', 'difflib', 'urllib', 'pathlib'}"
    code = (
        f"import sys; from coldstart import config; config.load(store='memory://'); print({heavy} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
