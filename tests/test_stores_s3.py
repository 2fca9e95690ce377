"""The S3 store: what goes over the wire, what is believed of the answers, and how every failure is named.

moto plays a server that behaves; ``ScriptedServer`` plays one that does not.
"""

from __future__ import annotations

import base64
import hashlib
import socket
import ssl
import struct
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, NamedTuple

import pytest

from coldstart.errors import (
    AccessDeniedError,
    BlobCorruptError,
    ColdstartError,
    ConditionFailedError,
    ObjectMissingError,
    StoreError,
    StoreSetupError,
    StoreTransientError,
)
from coldstart.stores import StoreOptions, open_store
from coldstart.stores.base import Capabilities
from coldstart.stores.location import locate
from coldstart.stores.retrying import RetryingStore
from coldstart.stores.s3 import S3Store
from coldstart.stores.s3_errors import failure
from coldstart.testing import FakeClock

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SECRETS = ("PLANTEDID", "planted-secret", "planted-token")


class Answer(NamedTuple):
    """What the scripted server says to one request. ``announced``: Content-Length, where it is not the body's."""

    status: int = 200
    headers: dict[str, str] = {}
    body: bytes = b""
    announced: int | None = None
    ending: str = ""


class Request(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    connection: int
    """The port of the client, which tells connections apart."""


class ScriptedServer:
    """An HTTP server on this machine that gives the answers it was told to, in order, and keeps what it was asked."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.answers: list[Answer] = []
        self.requests: list[Request] = []
        self.release = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                headers = {name.lower(): value for name, value in self.headers.items()}
                outer.requests.append(Request(self.command, self.path, headers, body, self.client_address[1]))
                outer.give(self, outer.answers.pop(0) if outer.answers else Answer(500))

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = handle_any

            def log_message(self, *arguments: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *arguments: object) -> None:
                """A client that hangs up in the middle is what many tests are about."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        if context is not None:
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"{'https' if context else 'http'}://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def give(self, handler: BaseHTTPRequestHandler, answer: Answer) -> None:
        if answer.ending == "silence":
            self.release.wait(60)
        handler.send_response(answer.status)
        length = len(answer.body) if answer.announced is None else answer.announced
        for name, value in {"Content-Length": str(length), **answer.headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(answer.body)
        if answer.ending == "stall":
            handler.wfile.flush()
            self.release.wait(60)
        if answer.ending == "reset":
            handler.wfile.flush()
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if answer.ending:
            handler.close_connection = True

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture(scope="module")
def lasting_server() -> Iterator[ScriptedServer]:
    """One server for all tests of this module."""
    server = ScriptedServer()
    yield server
    server.close()


@pytest.fixture(scope="module")
def lasting_store(lasting_server: ScriptedServer) -> Iterator[S3Store]:
    """Making a boto3 client takes a third of a second, so one serves all tests that need no other."""
    store = scripted(lasting_server)
    yield store
    store.close()


@pytest.fixture
def server(lasting_server: ScriptedServer) -> ScriptedServer:
    """The server without a script."""
    lasting_server.answers.clear()
    lasting_server.requests.clear()
    return lasting_server


@pytest.fixture
def store(lasting_store: S3Store, server: ScriptedServer) -> S3Store:
    """A store of a bucket on the server."""
    lasting_store._throttled_monotonic_seconds = float("-inf")  # by the server of another test
    return lasting_store


def scripted(server: ScriptedServer, **options: object) -> S3Store:
    """A store of its own on the server, with the planted credentials."""
    settings = StoreOptions(server.url, "auto", *SECRETS)
    return S3Store(locate("s3://bucket/prefix", settings), settings, **options)


def error_body(code: str) -> bytes:
    """An S3 error that repeats, as real ones do, what was sent."""
    return (
        f"<Error><Code>{code}</Code><Message>what the server says</Message><AWSAccessKeyId>{SECRETS[0]}</AWSAccessKeyId>"
        f"<Token-0>{SECRETS[2]}</Token-0><CanonicalRequest>x-amz-security-token:{SECRETS[2]}</CanonicalRequest></Error>"
    ).encode()


def listing(entries: str) -> bytes:
    """The body of a complete listing."""
    return f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>".encode()


def ranged(start: int, end: int, total: int | str, body: bytes | None = None, **more: object) -> Answer:
    """The answer to a range; by default with as many zero bytes as it says."""
    content = bytes(end - start + 1) if body is None else body
    return Answer(206, {"Content-Range": f"bytes {start}-{end}/{total}", "ETag": '"e"'}, content, **more)


OPERATIONS = {
    "get": lambda store: store.get("k"),
    "read_into": lambda store: store.read_into("k", memoryview(bytearray(10))),
    "head": lambda store: store.head("k"),
    "put": lambda store: store.put("k", b"data"),
    "create": lambda store: store.put("k", b"data", if_absent=True),
    "swap": lambda store: store.put("k", b"data", if_match='"e"'),
    "delete": lambda store: store.delete("k"),
    "list": lambda store: list(store.list("")),
}


# --- what is sent --------------------------------------------------------------------------------------------------


def test_a_put_is_one_plain_request_with_its_checksum(store: S3Store, server: ScriptedServer):
    """One PUT, path-style, with length and Content-MD5, without chunked framing, trailing checksums or an Expect."""
    server.answers = [Answer(headers={"ETag": '"tag"'})]
    assert store.put("blobs/ab", memoryview(b"data")) == '"tag"'
    (request,) = server.requests
    assert (request.method, request.path, request.body) == ("PUT", "/bucket/prefix/blobs/ab", b"data")
    assert request.headers["content-md5"] == base64.b64encode(hashlib.md5(b"data").digest()).decode()
    assert request.headers["content-length"] == "4"
    assert not {"expect", "transfer-encoding", "content-encoding", "x-amz-trailer"} & set(request.headers)


def test_conditions_are_sent_as_headers(store: S3Store, server: ScriptedServer):
    """if_absent is If-None-Match: *, if_match the etag just as the server gave it, and a plain put has neither."""
    server.answers = [Answer(headers={"ETag": '"tag"'})] * 3
    store.put("k", b"", if_absent=True)
    store.put("k", b"", if_match='"tag"')
    store.put("k", b"")
    sent = [(request.headers.get("if-none-match"), request.headers.get("if-match")) for request in server.requests]
    assert sent == [("*", None), (None, '"tag"'), (None, None)]


def test_conditions_that_the_server_does_not_enforce_are_not_sent(server: ScriptedServer):
    """With fewer capabilities the options are taken and have no effect on the wire."""
    unenforced = Capabilities(create_if_absent=False, compare_and_swap=False, ranges=True)
    store = scripted(server, capabilities=unenforced)
    server.answers = [Answer(headers={"ETag": '"tag"'})] * 2
    store.put("k", b"", if_absent=True)
    store.put("k", b"", if_match='"tag"')
    assert store.capabilities == unenforced
    assert not {"if-none-match", "if-match"} & {name for request in server.requests for name in request.headers}
    store.close()


def test_the_session_token_is_used(store: S3Store, server: ScriptedServer):
    """Temporary credentials are sent whole: the token as a header, the id in the signature, the secret never."""
    server.answers = [Answer(headers={"ETag": '"tag"'})]
    store.put("k", b"data")
    headers = server.requests[0].headers
    assert headers["x-amz-security-token"] == SECRETS[2]
    assert f"Credential={SECRETS[0]}/" in headers["authorization"]
    assert SECRETS[1] not in str(server.requests)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_call_is_one_attempt(store: S3Store, server: ScriptedServer, operation: str):
    """A failure that botocore would repeat is left to the retrying wrapper."""
    server.answers = [Answer(503, body=error_body("SlowDown"))] * 3
    with pytest.raises(StoreTransientError):
        OPERATIONS[operation](store)
    assert len(server.requests) == 1


# --- what is believed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [{}, {"x-amz-bucket-region": "eu-west-1"}, {"Location": "/elsewhere"}], ids=str)
@pytest.mark.parametrize("status", [301, 302, 307, 400])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_redirect_is_followed(
    store: S3Store, server: ScriptedServer, operation: str, status: int, headers: dict[str, str]
):
    """Whatever a redirect says, it is one request and an error: nothing is signed for another place, or sent twice."""
    code = b"<Error><Code>AuthorizationHeaderMalformed</Code><Region>eu-west-1</Region></Error>"
    server.answers = [Answer(status, headers, code)] * 5
    with pytest.raises(StoreError):
        OPERATIONS[operation](store)
    (request,) = server.requests
    assert "/auto/s3/" in request.headers["authorization"]


@pytest.mark.parametrize("throttle", [429, 503])
@pytest.mark.parametrize("odd", [405, 400, 411, 414])
def test_an_odd_refusal_after_a_throttle_is_asked_again_elsewhere(
    store: S3Store, server: ScriptedServer, throttle: int, odd: int
):
    """A 4xx that makes no sense, soon after a throttle, is repeated, and each of the three on a connection of its own."""
    server.answers = [Answer(throttle, body=error_body("SlowDown")), Answer(odd), Answer(headers={"ETag": '"tag"'})]
    clock = FakeClock()
    assert RetryingStore(store, clock=clock).put("k", b"data") == '"tag"'
    assert len({request.connection for request in server.requests}) == 3


def test_an_odd_refusal_by_itself_is_not_repeated(
    store: S3Store, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
):
    """Without a throttle before it, or long after one, it is the server's answer; what has a meaning always is."""
    server.answers = [Answer(405), Answer(429), Answer(403, body=error_body("AccessDenied"))]
    for expected in (StoreError, StoreTransientError, AccessDeniedError):
        with pytest.raises(StoreError) as caught:
            store.put("k", b"data")
        assert type(caught.value) is expected
    monkeypatch.setattr("coldstart.stores.s3.ODD_SECONDS", 0.0)
    server.answers = [Answer(405)]
    with pytest.raises(StoreError) as caught:
        store.put("k", b"data")
    assert type(caught.value) is StoreError


def test_a_put_over_tls_is_one_plain_request_too(certificate: Path, monkeypatch: pytest.MonkeyPatch):
    """Over TLS, where botocore by itself sends chunks with a trailing checksum, it is the same plain request as without."""
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server = ScriptedServer(context)
    server.answers = [Answer(headers={"ETag": '"tag"'})]
    store = scripted(server)
    try:
        store.put("blobs/ab", memoryview(b"data"))
    finally:
        store.close()
        server.close()
    (request,) = server.requests
    assert (request.method, request.path, request.body) == ("PUT", "/bucket/prefix/blobs/ab", b"data")
    assert request.headers["content-md5"] == base64.b64encode(hashlib.md5(b"data").digest()).decode()
    assert request.headers["content-length"] == "4"
    assert not {"expect", "transfer-encoding", "content-encoding", "x-amz-trailer"} & set(request.headers)


def test_a_range_is_asked_for_and_put_in_place(store: S3Store, server: ScriptedServer):
    """The inclusive range of the target's length goes out, no checksum is asked for, the bytes land in the target."""
    server.answers = [ranged(5, 14, 100, b"0123456789")]
    target = bytearray(10)
    store.read_into("k", memoryview(target), offset_bytes=5)
    assert server.requests[0].headers["range"] == "bytes=5-14"
    assert "x-amz-checksum-mode" not in server.requests[0].headers
    assert bytes(target) == b"0123456789"


def test_a_range_of_several_pieces_is_complete(store: S3Store, server: ScriptedServer):
    """A range longer than a read's piece arrives whole and in order."""
    body = bytes(range(256)) * (3 << 12) + b"end"
    server.answers = [ranged(0, len(body) - 1, len(body), body)]
    target = bytearray(len(body))
    store.read_into("k", memoryview(target))
    assert target == body


@pytest.mark.parametrize(
    "answer",
    [
        Answer(200, {"ETag": '"e"'}, bytes(10)),
        Answer(200, {"ETag": '"e"'}, bytes(100)),
        Answer(200, {"ETag": '"e"', "Content-Range": "bytes 5-14/100"}, bytes(10)),
        Answer(206, {"ETag": '"e"'}, bytes(10)),
        ranged(6, 15, 100),
        ranged(5, 13, 100),
        ranged(5, 14, 100, bytes(9)),
        ranged(5, 14, 100, bytes(11)),
        Answer(206, {"Content-Range": "bytes */100"}, bytes(10)),
        Answer(206, {"Content-Range": "5-14/100"}, bytes(10)),
        Answer(206, {"Content-Range": "bytes 5-14/100 "}, b""),
        Answer(200, body=b"<Error><Code>InternalError</Code></Error>"),
        Answer(200, {"Content-Type": "text/html"}, b"<html>sign in to the hotel's network</html>"),
        Answer(204),
    ],
)
def test_an_answer_to_another_question_is_not_believed(store: S3Store, server: ScriptedServer, answer: Answer):
    """A whole body, a shifted or short range, a page of a proxy: transient, and the target is not trusted."""
    server.answers = [answer]
    with pytest.raises(StoreTransientError):
        store.read_into("k", memoryview(bytearray(10)), offset_bytes=5)


@pytest.mark.parametrize("answer", [Answer(416, body=error_body("InvalidRange")), ranged(5, 9, 10), ranged(5, 13, 14)])
def test_a_short_object_is_corruption(store: S3Store, server: ScriptedServer, answer: Answer):
    """Where the answer says that the object ends before the range does, asking again cannot help."""
    server.answers = [answer]
    with pytest.raises(BlobCorruptError):
        store.read_into("k", memoryview(bytearray(10)), offset_bytes=5)


@pytest.fixture(scope="module")
def impatient(lasting_server: ScriptedServer) -> Iterator[S3Store]:
    """A store that waits 0.3 seconds for a byte."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("coldstart.stores.s3.READ_TIMEOUT_SECONDS", 0.3)
        store = scripted(lasting_server)
    yield store
    store.close()


@pytest.mark.parametrize("ending", ["fin", "reset", "stall"])
@pytest.mark.parametrize("operation", ["get", "read_into"])
def test_a_body_that_breaks_off_is_transient(impatient: S3Store, server: ScriptedServer, operation: str, ending: str):
    """A connection closed, reset or silent in the middle of a body is never a short or padded result."""
    headers = {"Content-Range": "bytes 0-9/10", "ETag": '"e"'}
    server.answers = [Answer(206 if operation == "read_into" else 200, headers, b"half!", announced=10, ending=ending)]
    with pytest.raises(StoreTransientError):
        OPERATIONS[operation](impatient)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_silent_server_is_transient(impatient: S3Store, server: ScriptedServer, operation: str):
    """No answer at all within the read timeout ends the call."""
    server.answers = [Answer(ending="silence")]
    with pytest.raises(StoreTransientError):
        OPERATIONS[operation](impatient)


def test_nobody_listening_is_transient():
    """A refused connection may pass; the error names the store and the key."""
    server = ScriptedServer()
    store = scripted(server)
    server.close()
    with pytest.raises(StoreTransientError, match=r"s3://bucket/prefix.*'k'") as caught:
        store.get("k")
    assert caught.value.key == "k"
    store.close()


@pytest.mark.parametrize(
    ("operation", "answer"),
    [
        ("get", Answer(200, body=b"data")),
        ("put", Answer(200)),
        ("head", Answer(200, {"ETag": '"e"'})),
        ("head", Answer(200, {"ETag": '"e"', "Last-Modified": "the day before"})),
        ("list", Answer(200, body=b"<html>not a listing</html>")),
        ("list", Answer(200, body=b"not even markup")),
        ("list", Answer(200, body=b"<ListBucketResult></ListBucketResult>")),
        ("list", Answer(200, body=b"<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>")),
        ("list", Answer(200, body=listing("<Contents><Key>prefix/k</Key></Contents>"))),
        ("list", Answer(200, body=listing("<Contents><Key>prefix/k</Key><Size>many</Size></Contents>"))),
    ],
)
def test_an_incomplete_answer_is_an_error_of_ours(
    store: S3Store, server: ScriptedServer, operation: str, answer: Answer
):
    """An answer without etag, size or date, or that is no S3 at all, is StoreTransientError and nobody else's error."""
    server.answers = [answer]
    with pytest.raises(StoreTransientError):
        OPERATIONS[operation](store)


def test_a_listing_leaves_out_what_is_not_ours(store: S3Store, server: ScriptedServer):
    """Folder markers and keys outside the grammar, which others may have put there, are not given."""
    entries = "".join(
        f"<Contents><Key>{key}</Key><Size>1</Size><LastModified>2026-01-01T00:00:00Z</LastModified></Contents>"
        for key in ("prefix/", "prefix/a b", "prefix/../up", "prefix/a/k", "prefix/a/")
    )
    server.answers = [Answer(200, body=listing(entries))]
    assert [info.key for info in store.list("")] == ["a/k"]
    assert "prefix=prefix%2F" in server.requests[0].path


# --- how failures are named ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (400, "RequestTimeout", StoreTransientError),
        (400, "BadDigest", StoreTransientError),
        (400, "IncompleteBody", StoreTransientError),
        (400, "ExpiredToken", AccessDeniedError),
        (400, "InvalidToken", AccessDeniedError),
        (400, "AuthorizationHeaderMalformed", StoreSetupError),
        (400, "InvalidArgument", StoreError),
        (301, "PermanentRedirect", StoreSetupError),
        (401, "Unauthorized", AccessDeniedError),
        (403, "AccessDenied", AccessDeniedError),
        (403, "SignatureDoesNotMatch", AccessDeniedError),
        (403, "RequestTimeTooSkewed", AccessDeniedError),
        (403, "ObjectLockedByBucketPolicy", AccessDeniedError),
        (404, "NoSuchBucket", StoreSetupError),
        (405, "MethodNotAllowed", StoreError),
        (408, "RequestTimeout", StoreTransientError),
        (429, "TooManyRequests", StoreTransientError),
        (499, "ClientDisconnect", StoreTransientError),
        (500, "InternalError", StoreTransientError),
        (501, "NotImplemented", StoreSetupError),
        (502, "", StoreTransientError),
        (503, "SlowDown", StoreTransientError),
        (504, "GatewayTimeout", StoreTransientError),
    ],
)
@pytest.mark.parametrize("operation", ["get", "create"])
def test_a_refusal_is_named_by_its_condition(
    store: S3Store, server: ScriptedServer, operation: str, status: int, code: str, expected: type
):
    """Every status and code has one class, and the text has store, key, status and code."""
    server.answers = [Answer(status, {"Content-Type": "application/xml"}, error_body(code))] * 5
    with pytest.raises(ColdstartError) as caught:
        OPERATIONS[operation](store)
    assert type(caught.value) is expected
    assert caught.value.key == "k"
    for part in ("s3://bucket/prefix", "'k'", str(status), code):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("operation", "status", "code", "expected"),
    [
        ("get", 404, "NoSuchKey", ObjectMissingError),
        ("read_into", 404, "NoSuchKey", ObjectMissingError),
        ("head", 404, "", ObjectMissingError),
        ("put", 404, "NoSuchBucket", StoreSetupError),
        ("create", 412, "PreconditionFailed", ConditionFailedError),
        ("create", 409, "ConditionalRequestConflict", ConditionFailedError),
        ("swap", 412, "PreconditionFailed", ConditionFailedError),
        ("swap", 409, "ConditionalRequestConflict", ConditionFailedError),
        ("swap", 404, "NoSuchKey", ConditionFailedError),
        ("swap", 404, "NoSuchBucket", StoreSetupError),
        ("put", 409, "OperationAborted", StoreTransientError),
        ("delete", 409, "OperationAborted", StoreTransientError),
        ("list", 404, "NoSuchBucket", StoreSetupError),
    ],
)
def test_a_status_means_what_the_operation_makes_it(
    store: S3Store, server: ScriptedServer, operation: str, status: int, code: str, expected: type
):
    """404, 409 and 412 differ between reading, writing, and writing under a condition."""
    server.answers = [Answer(status, body=b"" if operation == "head" else error_body(code))]
    with pytest.raises(StoreError) as caught:
        OPERATIONS[operation](store)
    assert type(caught.value) is expected


def test_deleting_what_a_server_calls_missing_is_no_error(store: S3Store, server: ScriptedServer):
    """Some servers answer 404 where S3 answers 204."""
    server.answers = [Answer(404, body=error_body("NoSuchKey")), Answer(204)]
    store.delete("k")
    store.delete("k")
    assert [request.method for request in server.requests] == ["DELETE", "DELETE"]


def test_a_hostile_code_is_not_shown(store: S3Store, server: ScriptedServer):
    """What is no plain word in an error's place for the code does not reach the text."""
    server.answers = [
        Answer(400, body=b"<Error><Code>\x1b[31m https://evil planted</Code></Error>".replace(b"\x1b", b"&#27;"))
    ]
    with pytest.raises(ColdstartError) as caught:
        store.get("k")
    assert "evil" not in str(caught.value)


@pytest.mark.parametrize("answer", [
    Answer(403, body=error_body("SignatureDoesNotMatch")),
    Answer(400, body=error_body("InvalidToken")),
    Answer(503, body=error_body("SlowDown")),
    Answer(200, body=SECRETS[2].encode()),
    Answer(200, body=b"half", announced=10, ending="fin"),
])  # fmt: skip
@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_error_shows_a_secret(store: S3Store, server: ScriptedServer, operation: str, answer: Answer):
    """Neither the text nor the traceback of any failure has the id, the secret or the token, even if the server echoes."""
    server.answers = [answer] * 5
    try:
        OPERATIONS[operation](store)
    except ColdstartError as error:
        shown = "".join(traceback.format_exception(error)) + repr(error)
        assert not [secret for secret in SECRETS if secret in shown]


def test_the_store_shows_no_secret(store: S3Store, server: ScriptedServer):
    """repr, url and the attributes of the store hold its address and no credential."""
    shown = repr(store) + store.url + repr(vars(store))
    assert not [secret for secret in SECRETS if secret in shown]


def test_every_error_of_botocore_has_a_name_of_ours():
    """Whatever class of error botocore raises, it becomes a StoreError; the network's are transient, no others are."""
    import botocore.exceptions as known

    kinds = [kind for kind in vars(known).values() if isinstance(kind, type) and issubclass(kind, known.BotoCoreError)]
    named = {kind.__name__: failure(kind.__new__(kind), "s3://bucket", "k") for kind in kinds}
    assert len(named) > 50
    assert {type(error) for error in named.values()} == {StoreTransientError, AccessDeniedError, StoreSetupError}
    transient = {name for name, error in named.items() if type(error) is StoreTransientError}
    assert {"ReadTimeoutError", "ConnectTimeoutError", "EndpointConnectionError", "ResponseStreamingError"} <= transient
    assert not transient & {"NoCredentialsError", "ParamValidationError", "ProfileNotFound", "NoRegionError"}
    assert type(named["NoCredentialsError"]) is type(named["UnauthorizedSSOTokenError"]) is AccessDeniedError


def test_an_untrusted_certificate_will_not_pass():
    """A certificate that fails its check is a setup error, a broken handshake may pass."""
    from botocore.exceptions import SSLError

    untrusted = SSLError(endpoint_url="https://host", error="[SSL: CERTIFICATE_VERIFY_FAILED] self-signed")
    broken = SSLError(endpoint_url="https://host", error="EOF occurred in violation of protocol")
    assert type(failure(untrusted, "s3://bucket", "k")) is StoreSetupError
    assert type(failure(broken, "s3://bucket", "k")) is StoreTransientError


# --- credentials and settings of the machine -----------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    StoreOptions(access_key_id="id"),
    StoreOptions(secret_access_key="planted-secret"),
    StoreOptions(session_token="planted-token"),
])  # fmt: skip
def test_half_a_credential_is_refused(options: StoreOptions):
    """An id without its secret, a secret without its id, a token without both: an error at opening."""
    with pytest.raises(StoreSetupError) as caught:
        open_store("s3://bucket", options)
    assert "planted" not in str(caught.value)


def test_the_usual_chain_is_used_without_options(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch):
    """Credentials of the environment sign requests where none were given."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "FROMENVIRONMENT")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    store = open_store("s3://bucket", StoreOptions(endpoint_url=server.url))
    server.answers = [Answer(200, {"ETag": '"e"'}, b"data")]
    assert store.get("k").data == b"data"
    assert "Credential=FROMENVIRONMENT/" in server.requests[0].headers["authorization"]
    store.close()


def test_the_metadata_service_is_never_asked(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch):
    """Without credentials anywhere the first call fails at once, without a request to the instance's metadata service."""
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", server.url)
    monkeypatch.setenv("AWS_DEFAULTS_MODE", "auto")
    settings = StoreOptions(endpoint_url=server.url)
    store = S3Store(locate("s3://bucket", settings), settings)
    with pytest.raises(AccessDeniedError, match="no usable credentials"):
        store.get("k")
    assert server.requests == []
    store.close()


def test_an_endpoint_of_the_environment_is_ignored(monkeypatch: pytest.MonkeyPatch):
    """AWS_ENDPOINT_URL cannot lead snapshots and signed requests elsewhere."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://evil.example.org")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://evil.example.org")
    settings = StoreOptions(access_key_id="id", secret_access_key="secret", region="eu-west-1")
    store = S3Store(locate("s3://bucket", settings), settings)
    assert store._client.meta.endpoint_url == "https://s3.eu-west-1.amazonaws.com"
    store.close()


def test_a_broken_profile_is_a_setup_error(monkeypatch: pytest.MonkeyPatch):
    """An AWS profile that is not there is named at opening."""
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StoreSetupError, match="nobody"):
        open_store("s3://bucket", StoreOptions())


def test_what_a_credential_helper_prints_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A credential_process that fails is AccessDeniedError, without its output, which may hold anything."""
    config = tmp_path / "config"
    config.write_text("[default]\ncredential_process = sh -c 'echo planted-secret >&2; exit 1'\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    settings = StoreOptions(endpoint_url="http://127.0.0.1:9")
    with pytest.raises(AccessDeniedError, match="no usable credentials") as caught:
        S3Store(locate("s3://bucket", settings), settings)
    assert "planted-secret" not in "".join(traceback.format_exception(caught.value))


# --- against moto --------------------------------------------------------------------------------------------------


def test_a_missing_bucket_is_a_setup_error(s3_options: StoreOptions):
    """A bucket that does not exist is told from a key that does not, with the remedy."""
    store = open_store("s3://there-is-no-such-bucket", s3_options)
    for operation in ("get", "put", "list", "delete"):
        with pytest.raises(StoreSetupError, match="create it"):
            OPERATIONS[operation](store)
    store.close()


def test_two_stores_of_one_bucket_do_not_meet(s3_bucket: str, s3_options: StoreOptions):
    """Prefixes separate stores, also where one prefix begins like the other."""
    first, second = (open_store(f"s3://{s3_bucket}/{prefix}", s3_options) for prefix in ("a", "ab"))
    first.put("k", b"first")
    second.put("k", b"second")
    assert (first.get("k").data, second.get("k").data) == (b"first", b"second")
    assert [info.size_bytes for info in first.list("")] == [5]
    first.close()
    second.close()


def test_a_listing_goes_over_pages(s3_bucket: str, s3_options: StoreOptions, monkeypatch: pytest.MonkeyPatch):
    """More objects than a page holds are all listed, once."""
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "4")
    store = S3Store(locate(f"s3://{s3_bucket}", s3_options), s3_options)
    for number in range(10):
        store.put(f"blobs/{number}", b"")
    assert sorted(info.key for info in store.list("blobs/")) == [f"blobs/{number}" for number in range(10)]
    store.close()
