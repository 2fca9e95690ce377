"""Secrets in what people read: planted wherever they come from, and found nowhere."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import traceback
import urllib.parse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldstart import coldstart, config, sinks
from coldstart.cli import main
from coldstart.events import EventBus, FellBack, UserLine, WorkerThawed, error_text
from coldstart.redaction import MASK, Redactor, is_secret_name, without_shapes
from coldstart.registry import enter_serving, worker_for
from coldstart.stores.memory import MemoryStore
from tests.starts import Project

PLANTED = "pLaNtEd0123456789abcdef"


def logged(event, *, log="json", environ=None, **overrides):
    """The line that a sink writes for an event."""
    stream, bus = io.StringIO(), EventBus()
    bus.publish(event)
    sinks.attach_structlog(bus, config.load(environ, log=log, **overrides), stream=stream)
    return stream.getvalue()


# --- by shape ----------------------------------------------------------------------------------------------------------

SHAPES = {
    "signed header": f"Authorization: AWS4-HMAC-SHA256 Credential={PLANTED}/20260101/auto/s3/aws4_request, SignedHeaders=host, Signature={PLANTED}",
    "signed header in a repr": f"{{'Authorization': 'AWS4-HMAC-SHA256 Credential={PLANTED}/x, SignedHeaders=host, Signature={PLANTED}'}}",
    "signed value alone": f"got AWS4-HMAC-SHA256 Credential={PLANTED}/x,SignedHeaders=a;b,Signature={PLANTED} of it",
    "presigned URL": f"https://host/k?X-Amz-Credential={PLANTED}%2F2026&X-Amz-Signature={PLANTED}&X-Amz-Security-Token={PLANTED}",
    "escaped presigned URL": f"next=https%3A%2F%2Fhost%3FX-Amz-Signature%3D{PLANTED}",
    "token header": f"x-amz-security-token:{PLANTED}",
    "key header": f"X-API-Key: {PLANTED}",
    "cookie": f"Set-Cookie: session={PLANTED}; Path=/",
    "user in a URL": f"cannot open https://someone:{PLANTED}@host/path",
    "user alone in a URL": f"redis://{PLANTED}@host:6379",
    "bearer": f"401 for Bearer {PLANTED}",
    "basic": f"sent Basic {PLANTED}==",
    "keyword": f"connect(host='h', password='{PLANTED}')",
    "long keyword": f"MY_SERVICE_API_KEY={PLANTED} is wrong",
    "JSON": json.dumps({"aws_secret_access_key": f"{PLANTED} with spaces"}),
    "query": f"https://host/?a=b&access_token={PLANTED}&c=d",
    "RunPod": f"rpa_{PLANTED}",
    "Hugging Face": f"hf_{PLANTED}",
    "our signing key": f"csk_{PLANTED}{PLANTED}",
    "GitHub": f"ghp_{PLANTED}",
    "Modal": f"ak-{PLANTED} as-{PLANTED}",
    "sk": f"sk-proj-{PLANTED}",
    "AWS key id": "AKIA" + PLANTED.upper(),
    "web token": f"eyJ{PLANTED}.{PLANTED}.{PLANTED}",
}


@pytest.mark.parametrize("kind", SHAPES)
def test_what_looks_like_a_credential_is_taken_out(kind):
    """In a text of any origin, and again in a text that was cleaned before; what stands around it stays."""
    clean = without_shapes(f"it failed: {SHAPES[kind]}")
    assert PLANTED.lower() not in clean.lower()
    assert MASK in clean
    assert clean.startswith("it failed: ")
    assert without_shapes(clean) == clean


@pytest.mark.parametrize(
    "text",
    [
        "AccessDeniedError: s3://bucket/prefix answered 403 (InvalidAccessKeyId) for 'refs/a': check the credentials",
        "no usable credentials for s3://bucket (NoCredentialsError): give them as settings or to the AWS chain",
        "COLDSTART_SIGNATURES=require needs a key to check with: set COLDSTART_VERIFY_KEYS to the public keys",
        "refs/minilm/0123456789abcdef0123456789abcdef is signed with key 0123456789abcdef, which is none",
        "COLDSTART_SIGNING_KEY_FILE='/run/key' cannot be read: Permission denied",
        "max_new_tokens=512 tokenizer=bert key=model.embed.weight as-simple-as-possible task-1234567890abcdef12",
        "basic information and bearer authentication",
        "ValueError: invalid token: expected a string, got https://host:443/path?versionId=3 and a@b.org",
    ],
)
def test_ordinary_texts_stay_as_they_are(text):
    """Our own messages, and texts that only speak of secrets, are not touched."""
    assert without_shapes(text) == text


@pytest.mark.parametrize(
    "name", ["secret", "HF_TOKEN", "apiKey", "db-password", "aws_access_key_id", "X-Amz-Signature", "Cookie"]
)
def test_names_of_secrets(name):
    """A field of such a name is masked, whatever it looks like."""
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name", ["tokens", "max_tokens", "tokenizer", "key", "cache_key", "COLDSTART_SIGNING_KEY_FILE", "signatures"]
)
def test_names_of_other_things(name):
    """These hold no secret."""
    assert not is_secret_name(name)


@given(st.text(st.sampled_from("aA0_-=:/@.'\" tokensecret"), max_size=4000))
def test_any_text_is_cleaned_in_reasonable_time(text):
    """No text makes a pattern go back again and again; the limit of a test is what says so."""
    without_shapes(text * 10)


# --- by value ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log", ["json", "console"])
def test_a_known_secret_is_found_in_every_form(log):
    """As it is, in a URL, in a repr, in a nested value, in an error, under any name: no line of a log has it."""
    secret = "pass/word+with'quo\"te\\s"
    fields = {
        "plain": f"x{secret}x",
        "deep": [{"a": (secret,)}],
        "quoted": urllib.parse.quote(secret, safe=""),
        "error": RuntimeError(secret),
        "odd": {secret},
        secret: 1,
    }
    line = logged(UserLine("m", f"using {secret}", fields), log=log, access_key_id="a" * 8, secret_access_key=secret)
    for form in (secret, urllib.parse.quote(secret, safe=""), "word+with"):
        assert form not in line
    assert line.count("\n") == 1


def test_secrets_of_the_environment_are_known(monkeypatch):
    """A variable whose name says so is a secret, though no setting is made from it; a path and a short word are not."""
    monkeypatch.setenv("MY_SERVICE_TOKEN", PLANTED)
    monkeypatch.setenv("OTHER_PASSWORD", "false")
    monkeypatch.setenv("GCP_CREDENTIALS", "/var/run/credentials.json")
    line = logged(FellBack("m", "restore", f"odd {PLANTED} false /var/run/credentials.json"))
    assert f"odd {MASK} false /var/run/credentials.json" in line


def test_credentials_that_a_thaw_brings_are_known(monkeypatch):
    """What the platform has set while the process was frozen is a secret from the first line after it."""
    stream, bus = io.StringIO(), EventBus()
    sinks.attach_structlog(bus, config.load(log="json"), stream=stream)
    monkeypatch.setenv("COLDSTART_SESSION_TOKEN", PLANTED)
    bus.publish(WorkerThawed("m", "platform", "restored", 0.1))
    bus.publish(FellBack("m", "restore", f"refused {PLANTED}"))
    assert PLANTED not in stream.getvalue()
    assert stream.getvalue().count("\n") == 2


def test_fields_under_names_of_secrets_are_masked():
    """What a user logs as ``password=`` is masked; numbers, empty texts and other fields stay."""
    line = json.loads(
        logged(UserLine("m", "hello", {"password": "x1", "token": "", "max_token": 512, "a": {"secret": "s"}}))
    )
    assert line["fields"] == {"password": MASK, "token": "", "max_token": 512, "a": {"secret": MASK}}


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner),
    )
)
def test_values_without_secrets_stay_as_they_are(value):
    """Cleaning gives back what JSON can say, unchanged where there is nothing to hide."""
    assert repr(Redactor().value(value)) == repr(value)


# --- where secrets come from -------------------------------------------------------------------------------------------


def boto_errors():
    """Errors of boto3 that repeat what they were given."""
    exceptions = pytest.importorskip("botocore.exceptions")
    url = f"https://user:{PLANTED}@host/?X-Amz-Signature={PLANTED}"
    refused = {"Error": {"Code": "SignatureDoesNotMatch", "Message": f"x-amz-security-token:{PLANTED}"}}
    return [
        exceptions.EndpointConnectionError(endpoint_url=url),
        exceptions.ConnectTimeoutError(endpoint_url=url, error=f"Authorization: Bearer {PLANTED}"),
        exceptions.ClientError(refused, "GetObject"),
        exceptions.ParamValidationError(report=f"aws_secret_access_key='{PLANTED}'"),
        exceptions.InvalidConfigError(error_msg=f"session_token={PLANTED}"),
    ]


@pytest.mark.parametrize("number", range(5))
def test_an_error_of_boto3_shows_no_secret(number):
    """Its text as events carry it, and the line that is logged of it."""
    text = error_text(boto_errors()[number])
    assert PLANTED not in text
    assert PLANTED not in logged(FellBack("m", "restore", str(boto_errors()[number])))


def test_a_start_that_fails_with_a_secret_in_its_error_tells_none(tmp_path, monkeypatch):
    """A handler whose restore raises with a secret in the text: record, event and reason have none of it."""
    monkeypatch.setenv("COLDSTART_STORE", "memory://redaction")
    monkeypatch.setenv("COLDSTART_CAPTURE", "off")
    monkeypatch.setenv("COLDSTART_LOG", "off")
    monkeypatch.setenv("SERVICE_SECRET", PLANTED)

    @coldstart("leaky", load=lambda: 1, version="1")
    def handler(event, model):
        return model

    worker = worker_for(handler.__coldstart__)
    enter_serving()
    worker.hold_after_ready()
    worker.wait()
    worker._parts.write_record({**worker.record, "reason": f"OSError: told {PLANTED} and https://u:p@h/"})
    store = MemoryStore.shared("redaction")
    (info,) = store.list("starts/")
    record = json.loads(store.get(info.key).data)
    assert record["reason"] == f"OSError: told {MASK} and https://{MASK}@h/"
    assert record["kind"] == "cold"


def test_a_command_that_fails_shows_no_secret(tmp_path, monkeypatch, capsys):
    """What a handler's file raises is told to people without this process' secrets."""
    monkeypatch.setenv("SERVICE_API_KEY", PLANTED)
    path = tmp_path / "handler.py"
    path.write_text("import os\nraise RuntimeError('cannot use ' + os.environ['SERVICE_API_KEY'])\n")
    assert main(["run", str(path), "--input", "1"]) == 1
    told = capsys.readouterr()
    assert "cannot use ****" in told.err
    assert PLANTED not in told.err + told.out


def test_no_object_of_ours_shows_a_secret_in_a_traceback(monkeypatch):
    """Settings, options and stores in the text of an error."""
    from coldstart.early import address_of

    monkeypatch.setenv("COLDSTART_ACCESS_KEY_ID", f"id{PLANTED}")
    monkeypatch.setenv("COLDSTART_SECRET_ACCESS_KEY", PLANTED)
    settings = config.load()
    try:
        raise RuntimeError(f"{settings} {address_of(settings)} {settings.shown()}")
    except RuntimeError:
        told = traceback.format_exc()
    assert PLANTED not in told


def test_a_whole_life_in_a_process_shows_no_planted_secret(tmp_path):
    """Capture, restore, fallback and a failing start, with secrets planted all over: none in output, log or store."""
    project = Project(tmp_path)
    project.write(
        """
        import os
        import numpy as np
        from coldstart import coldstart

        def load(ctx):
            ctx.log("loading", password=ctx.secret("SERVICE_TOKEN"), url="https://u:" + ctx.secret("SERVICE_TOKEN") + "@h/")
            if os.path.exists("fail"):
                raise RuntimeError("no way with " + ctx.secret("SERVICE_TOKEN"))
            return {"a": np.ones(8)}

        @coldstart("careful", load=load, secrets=["SERVICE_TOKEN"], warmup=[{"x": 1}])
        def handler(event, model):
            return float(model["a"].sum())
        """
    )
    planted = {
        "SERVICE_TOKEN": PLANTED,
        "COLDSTART_ACCESS_KEY_ID": f"AK{PLANTED}",
        "COLDSTART_SECRET_ACCESS_KEY": f"SK{PLANTED}",
        "COLDSTART_LOG_LEVEL": "debug",
    }
    told = ""
    for log, arguments in (("json", ()), ("console", ()), ("json", ("--fresh",))):
        start = project.run(*arguments, COLDSTART_LOG=log, **planted)
        told += start.errors + json.dumps(start.document)
    (tmp_path / "fail").write_text("")
    failed = project.try_run("--fresh", COLDSTART_LOG="json", **planted)
    assert failed.code == 1
    assert "no way with ****" in failed.errors
    assert "loading" in told
    assert PLANTED not in told + failed.errors + json.dumps(failed.document)
    stored = [path for path in project.store.rglob("*") if path.is_file()]
    assert stored
    assert not any(PLANTED.encode() in path.read_bytes() for path in stored)


def test_nobody_pays_before_there_is_something_to_take_out():
    """What a worker imports has no patterns; the first error that is not ours compiles them."""
    code = "import sys, coldstart.worker, coldstart.config; sys.exit('coldstart.redaction' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
