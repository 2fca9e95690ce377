"""The client of management APIs, against a server on loopback."""

from __future__ import annotations

import contextlib
import socket
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from urllib.parse import quote, quote_plus

import pytest

from coldstart.deploy.rest import Recorder, RestClient, listed, runpod_client, segment
from coldstart.errors import (
    ConfigError,
    ConflictError,
    CredentialsError,
    DeployError,
    PlatformBusyError,
    RequestInvalidError,
    ResourceMissingError,
)
from tests.manage_plane import API_KEY, ManagePlane

TEMPLATE = {"name": "t", "image": "i:1", "serverless": True}


@pytest.fixture
def plane():
    """The API, empty."""
    with ManagePlane() as server:
        yield server


class Connected(RestClient):
    """A client of the plane that waits for nothing and remembers how long it would have waited."""

    def __init__(self, plane, key=API_KEY, **options):
        self.waited = []
        super().__init__(plane.url, key, sleep=self.waited.append, **options)


def refused(plane, kind, method="GET", **options):
    """The message of the error of a kind that one request raises."""
    client = Connected(plane, **options)
    with pytest.raises(DeployError) as caught:
        client.request(method, "/v2/templates", TEMPLATE if method == "POST" else None)
    assert type(caught.value) is kind
    assert API_KEY not in str(caught.value)
    assert caught.value.__cause__ is None
    return str(caught.value)


def test_requests_carry_the_key_in_its_header_and_nowhere_else(plane):
    """A request goes out as JSON with the bearer key; neither the client's text nor the path has it."""
    client = Connected(plane)
    made = client.request("POST", "/v2/templates", TEMPLATE)
    assert listed(client, "/v2/templates", "templates") == [made]
    assert client.request("DELETE", f"/v2/templates/{segment(made['id'])}") is None
    assert [(each.method, each.path, each.body) for each in plane.seen] == [
        ("POST", "/v2/templates", TEMPLATE), ("GET", "/v2/templates", None), ("DELETE", f"/v2/templates/{made['id']}", None),
    ]  # fmt: skip
    assert {each.authorization for each in plane.seen} == {f"Bearer {API_KEY}"}
    assert API_KEY not in repr(client)


@pytest.mark.parametrize(
    ("status", "kind", "advice"),
    [
        (400, RequestInvalidError, "change what the message names"),
        (401, CredentialsError, "make a new one"),
        (402, DeployError, "add credit"),
        (403, CredentialsError, "lacks the permission"),
        (404, ResourceMissingError, "it may have been deleted"),
        (409, ConflictError, "it exists already"),
        (418, DeployError, "see the API's reference"),
        (422, RequestInvalidError, "change what the message names"),
    ],
)
def test_each_refusal_is_an_error_of_its_condition(plane, status, kind, advice):
    """A status becomes the error of its condition at once, with what the API said and what to do, and without the key."""
    problem = {"title": "Nope", "status": status, "detail": f"your key {API_KEY} is bad", "errors": ["a: b", "c: d"]}
    plane.fail_next(1, status, problem)
    message = refused(plane, kind)
    assert f"GET {plane.url}/v2/templates: {status} Nope: your key **** is bad\n  - a: b\n  - c: d; " in message
    assert advice in message
    assert len(plane.seen) == 1


def test_a_wrong_key_is_told(plane):
    """A key that the API does not know is a credentials error that does not show it."""
    assert "401" in refused(plane, CredentialsError, key="rpa_wrong")


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_busy_answers_are_tried_again(plane, status):
    """Reads and deletions are tried again after busy answers, with growing pauses, and then given up."""
    client = Connected(plane)
    plane.fail_next(3, status)
    assert client.request("GET", "/v2/templates") == {"templates": []}
    assert client.waited == [0.5, 1.0, 2.0]
    plane.fail_next(4, status)
    assert f"{status} Told To Fail: the test said so" in refused(plane, PlatformBusyError)
    assert len(plane.seen) == 8


def test_writes_are_never_repeated(plane):
    """A creation that failed is not sent twice; where it may have been done all the same, the message says so."""
    plane.fail_next(1, 503)
    assert "it may have been done all the same" in refused(plane, PlatformBusyError, method="POST")
    plane.fail_next(1, 429)
    assert "all the same" not in refused(plane, PlatformBusyError, method="POST")
    plane.fail_next(1, 0)
    assert "no answer" in refused(plane, PlatformBusyError, method="POST")
    assert len(plane.seen) == 3


def test_the_api_says_how_long_to_wait(plane):
    """Retry-After is obeyed as seconds and as a date; more than half a minute is not waited for."""
    client = Connected(plane)
    plane.fail_next(1, 429, Retry_After="7")
    plane.fail_next(1, 503, Retry_After=format_datetime(datetime.now(UTC) - timedelta(minutes=1), usegmt=True))
    plane.fail_next(1, 503, Retry_After="soon")
    client.request("GET", "/v2/templates")
    assert client.waited == [7.0, 0.0, 2.0]
    plane.fail_next(1, 429, Retry_After="3600")
    with pytest.raises(PlatformBusyError, match="too many requests"):
        client.request("GET", "/v2/templates")
    assert len(plane.seen) == 5


def test_lost_connections_are_tried_again(plane):
    """A connection that ends without an answer is tried again; one that never comes about is an error with its reason."""
    client = Connected(plane)
    plane.fail_next(2, 0)
    assert client.request("GET", "/v2/templates") == {"templates": []}
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    gone = RestClient(f"http://127.0.0.1:{port}", API_KEY, sleep=lambda _: None)
    with pytest.raises(PlatformBusyError, match=r"no answer \(.*refused\)"):
        gone.request("GET", "/v2/templates")


def test_redirects_are_not_followed(plane):
    """A redirect is an error: the key does not travel to where it points."""
    plane.fail_next(1, 302, "", Location=f"{plane.url}/v2/pods")
    assert "redirects are not followed" in refused(plane, DeployError)
    assert [each.path for each in plane.seen] == ["/v2/templates"]


def test_answers_that_are_no_json_are_told(plane):
    """An answer that is not JSON is an error that shows its beginning, hidden texts masked."""
    plane.fail_next(1, 200, f"<html>{API_KEY} and hunter2</html>")
    message = refused(plane, DeployError, hidden=["hunter2"])
    assert "the answer is not JSON: '<html>**** and ****</html>'" in message
    plane.fail_next(1, 200, "[" * 100_000)
    assert "the answer is not JSON: '[[" in refused(plane, DeployError)
    plane.fail_next(1, 500, "<h1>oops hunter2</h1>")
    plane.fail_next(3, 500, ["a", "list"])
    assert '500 ["a", "list"]' in refused(plane, PlatformBusyError)


@pytest.mark.parametrize(
    "said",
    [
        lambda secret: {"title": "bad", "errors": [{"field": "env.KEY", "value": secret}]},
        lambda secret: {"message": "bad env", "value": secret},
        lambda secret: f"<html>{secret}</html>",
        lambda secret: f"/v2/{quote(secret)}/ and {quote_plus(secret)}",
    ],
)
def test_hidden_values_are_masked_in_every_form(plane, said):
    """A secret of several lines, with quotes, is not to be read where an answer repeats it quoted, escaped or joined."""
    secret = '-----BEGIN\n"ké/y" {{ x }}\nEND'
    plane.fail_next(1, 422, said(secret))
    message = refused(plane, RequestInvalidError, hidden=[secret])
    assert "****" in message
    assert "BEGIN" not in message


def test_hidden_values_are_masked_longest_first(plane):
    """A secret that contains another one is masked whole."""
    plane.fail_next(1, 422, {"detail": "env X=hunter22 is too long"})
    assert "env X=**** is too long" in refused(plane, RequestInvalidError, hidden=["hunter2", "hunter22", ""])


@pytest.mark.parametrize(
    "address",
    [
        "http://example.com",
        "ftp://example.com",
        "https://",
        "example.com",
        "https://user:pw@example.com",
        "https://a/?b",
        "http://[::1",
    ],
)
def test_only_https_and_loopback_are_talked_to(address):
    """An address that would carry the key in the open, or that is none, is refused without repeating credentials."""
    with pytest.raises(ConfigError) as caught:
        RestClient(address, API_KEY)
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize("key", ["", "a b", "a\nX-Other: 1", "clé"])
def test_a_key_that_cannot_be_one_is_refused(key):
    """A key with characters that no header takes is refused, and not shown."""
    with pytest.raises(CredentialsError) as caught:
        RestClient("https://example.com", key)
    assert not key or key not in str(caught.value)


def test_pages_are_followed(plane):
    """A list in pages is read to its end, and a cursor that repeats ends it."""
    client = Connected(plane)
    for cursor in ("c1", "c1"):
        plane.fail_next(
            1, 200, {"templates": [{"name": cursor}], "pagination": {"hasNextPage": True, "nextCursor": cursor}}
        )
    assert [each["name"] for each in listed(client, "/v2/templates", "templates")] == ["c1", "c1"]
    assert [each.path for each in plane.seen] == ["/v2/templates", "/v2/templates?cursor=c1"]


@pytest.mark.parametrize("answer", [[], {}, {"templates": {}}, {"templates": [1]}])
def test_a_list_that_is_none_is_told(plane, answer):
    """An answer of another shape is an error, not an empty account."""
    plane.fail_next(1, 200, answer)
    with pytest.raises(DeployError, match="has no list of templates"):
        listed(Connected(plane), "/v2/templates", "templates")


def test_a_recorder_reads_and_keeps_what_would_be_written(plane):
    """A dry run reads through its client, keeps the writing requests, and answers creations with a telling id."""
    Connected(plane).request("POST", "/v2/templates", TEMPLATE)
    recorder = Recorder(plane.url, Connected(plane))
    assert len(listed(recorder, "/v2/templates", "templates")) == 1
    assert recorder.request("POST", "/v2/templates", TEMPLATE) == {**TEMPLATE, "id": "<id of t>"}
    assert recorder.request("DELETE", "/v2/templates/x") is None
    assert [tuple(each) for each in recorder.requests] == [
        ("POST", f"{plane.url}/v2/templates", TEMPLATE), ("DELETE", f"{plane.url}/v2/templates/x", None),
    ]  # fmt: skip
    assert len(plane.writes) == 1


def test_the_key_and_the_address_come_from_the_environment(plane, monkeypatch):
    """RUNPOD_API_KEY and RUNPOD_API_BASE_URL make the client; without a key only a dry run is possible."""
    with pytest.raises(CredentialsError, match="RUNPOD_API_KEY is not set: make a key"):
        runpod_client()
    blind = runpod_client(dry_run=True)
    assert isinstance(blind, Recorder)
    assert (blind.base_url, blind.knows, listed(blind, "/v2/pods", "pods")) == ("https://api.runpod.io", False, [])
    monkeypatch.setenv("RUNPOD_API_KEY", f" {API_KEY}\n")
    monkeypatch.setenv("RUNPOD_API_BASE_URL", plane.url + "/")
    client = runpod_client()
    assert isinstance(client, RestClient)
    assert client.request("GET", "/v2/pods") == {"pods": []}
    assert runpod_client(dry_run=True).request("GET", "/v2/pods") == {"pods": []}
