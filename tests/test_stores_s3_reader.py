"""Reading S3 without boto3: the same results and errors as the store that uses it, and a server that is not believed.

moto plays a server that behaves; ``RawServer`` sends whatever bytes it is told to.
"""

from __future__ import annotations

import itertools
import json
import ssl
import subprocess
import sys
import threading
import traceback
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldstart.errors import (
    AccessDeniedError,
    BlobCorruptError,
    ColdstartError,
    ObjectMissingError,
    StoreError,
    StoreSetupError,
    StoreTransientError,
)
from coldstart.stores import StoreOptions, http1, open_store
from coldstart.stores.base import StoredObject, innermost
from coldstart.stores.http1 import Endpoint, endpoint_of
from coldstart.stores.http1_answer import HEAD_BYTES, REFUSAL_BYTES, Limits
from coldstart.stores.location import locate
from coldstart.stores.retrying import RetryingStore
from coldstart.stores.s3 import S3Store
from coldstart.stores.s3_reader import ReadingS3Store, S3Reader, _endpoint, _unix_seconds, reads_directly
from tests.raw_server import RawServer, Said, said, said_range
from tests.starts import Project

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from coldstart.stores.base import Store

SECRETS = ("PLANTEDID", "planted-secret", "planted-token")
SHORT = Limits(connect_seconds=5, answer_seconds=0.3, deadline_seconds=20, floor_window_seconds=0.3)
OK_HEAD = b"HTTP/1.1 200 OK\r\n"


def reader_of(server: RawServer, *, limits: Limits = Limits(), path: str = "", prefix: str = "/prefix") -> S3Reader:  # noqa: B008
    """A reader of a bucket on the server, with the planted credentials."""
    options = StoreOptions(server.url + path, "eu-west-1", *SECRETS)
    return S3Reader(locate(f"s3://bucket{prefix}", options), options, limits=limits)


@pytest.fixture(scope="module")
def lasting_server() -> Iterator[RawServer]:
    """One server for all tests that need no other."""
    with RawServer() as server:
        yield server


@pytest.fixture
def server(lasting_server: RawServer) -> RawServer:
    """The server without a script."""
    lasting_server.answers.clear()
    lasting_server.asked.clear()
    return lasting_server


@pytest.fixture
def reader(server: RawServer) -> Iterator[S3Reader]:
    """A reader with connections of its own."""
    made = reader_of(server)
    yield made
    made.close()


def ten_bytes(reader: S3Reader | Store, offset_bytes: int = 5) -> bytes:
    """What a read of ten bytes puts in its target."""
    target = bytearray(10)
    reader.read_into("k", memoryview(target), offset_bytes=offset_bytes)
    return bytes(target)


READS: dict[str, Callable[[Any], object]] = {
    "get": lambda reader: reader.get("k"),
    "read_into": ten_bytes,
    "head": lambda reader: reader.head("k"),
}

# --- the same as with boto3 ----------------------------------------------------------------------------------------


def outcome(action: Callable[[], object]) -> object:
    """What an action returns, or the class and key of its error: what a caller can tell apart."""
    try:
        return action()
    except ColdstartError as error:
        return type(error), error.key


def filled(store: Store, key: str, length_bytes: int, offset_bytes: int) -> bytes:
    """What a read puts in a target of this length."""
    target = bytearray(length_bytes)
    store.read_into(key, memoryview(target), offset_bytes=offset_bytes)
    return bytes(target)


@pytest.fixture(scope="module")
def both(new_s3_bucket: Callable[[], str], s3_options: StoreOptions) -> Iterator[tuple[Store, Store]]:
    """The store that uses boto3 and the one that does not, of one bucket with a few objects."""
    location = locate(f"s3://{new_s3_bucket()}/some/pre=fix", s3_options)
    pair = S3Store(location, s3_options), ReadingS3Store(location, s3_options)
    for key, data in {"ten": b"0123456789", "empty": b"", "a=b/c..d/-": bytes(range(256)) * 300}.items():
        pair[0].put(key, data)
    yield pair
    for store in pair:
        store.close()


@pytest.mark.parametrize("key", ["ten", "empty", "a=b/c..d/-", "nothing", "ten/below", "../ten", "a b", ""])
@pytest.mark.parametrize(
    "read",
    [
        lambda store, key: store.get(key),
        lambda store, key: store.head(key),
        lambda store, key: filled(store, key, 0, 0),
        lambda store, key: filled(store, key, 0, 50),
        lambda store, key: filled(store, key, 10, 0),
        lambda store, key: filled(store, key, 4, 3),
        lambda store, key: filled(store, key, 1, 9),
        lambda store, key: filled(store, key, 11, 0),
        lambda store, key: filled(store, key, 1, 10),
        lambda store, key: filled(store, key, 70_000, 5_000),
    ],
)
def test_what_is_there_reads_the_same(both: tuple[Store, Store], read: Callable[[Store, str], object], key: str):
    """Objects, parts of them, empty and missing ones and illegal keys: the same value, or the same error about the key."""
    with_boto3, directly = (outcome(lambda store=store: read(store, key)) for store in both)
    assert directly == with_boto3


@pytest.mark.parametrize("read", READS)
def test_a_missing_bucket_is_the_same(s3_options: StoreOptions, read: str):
    """A bucket that is not there ends the same way, by the word of its own error where the server gives one."""
    location = locate("s3://there-is-no-such-bucket", s3_options)
    pair = S3Store(location, s3_options), ReadingS3Store(location, s3_options)
    with_boto3, directly = (outcome(lambda store=store: READS[read](store)) for store in pair)
    assert directly == with_boto3
    for store in pair:
        store.close()


def refused(status: str, code: str = "") -> Said:
    """A refusal that repeats, as real ones do, what was sent."""
    text = (
        f"<Error><Code>{code}</Code><Message>what the server says</Message><AWSAccessKeyId>{SECRETS[0]}</AWSAccessKeyId>"
        f"<CanonicalRequest>x-amz-security-token:{SECRETS[2]}</CanonicalRequest></Error>"
    )
    return said(text.encode(), status=status, Connection="close", ending="close")


SITUATIONS = {
    "whole": said(b"0123456789"),
    "range": said_range(5, b"0123456789", 100),
    "a range up to the end": said_range(5, b"0123456789", 15),
    "a shifted range": said_range(6, b"0123456789", 100),
    "a shorter range": said_range(5, b"012345678", 100),
    "more bytes than the range has": said(bytes(11), status="206 x", Content_Range="bytes 5-14/100"),
    "the end of a short object": said_range(5, b"012345678", 14),
    "all instead of a part": said(bytes(100)),
    "200 with a range": said(bytes(10), Content_Range="bytes 5-14/100"),
    "206 without": said(bytes(10), status="206 Partial Content"),
    "no unit": said(bytes(10), status="206 Partial Content", Content_Range="5-14/100"),
    "unknown range": said(bytes(10), status="206 Partial Content", Content_Range="bytes */100"),
    "unknown total": said(bytes(10), status="206 Partial Content", Content_Range="bytes 5-14/*"),
    "no etag": said(b"0123456789", ETag=""),
    "nothing": said(status="204 No Content"),
    "ends early": said(b"half!", announced=10, ending="close"),
    "part ends early": said(
        b"half!", status="206 Partial Content", Content_Range="bytes 5-14/100", announced=10, ending="close"
    ),
    "reset": said(b"half!", announced=10, ending="reset"),
    "416": refused("416 Range Not Satisfiable", "InvalidRange"),
    "wrong secret": refused("403 Forbidden", "SignatureDoesNotMatch"),
    "wrong id": refused("403 Forbidden", "InvalidAccessKeyId"),
    "not allowed": refused("403 Forbidden", "AccessDenied"),
    "skewed": refused("403 Forbidden", "RequestTimeTooSkewed"),
    "expired": refused("400 Bad Request", "ExpiredToken"),
    "malformed": refused("400 Bad Request", "InvalidArgument"),
    "401": refused("401 Unauthorized", "Unauthorized"),
    "no key": refused("404 Not Found", "NoSuchKey"),
    "no bucket": refused("404 Not Found", "NoSuchBucket"),
    "404 of a proxy": said(b"<html>not found</html>", status="404 Not Found", ending="close"),
    "405": refused("405 Method Not Allowed", "MethodNotAllowed"),
    "408": refused("408 Request Timeout", "RequestTimeout"),
    "409": refused("409 Conflict", "OperationAborted"),
    "429": refused("429 Too Many Requests", "TooManyRequests"),
    "499": refused("499 x", "ClientDisconnect"),
    "500": refused("500 Internal Server Error", "InternalError"),
    "501": refused("501 Not Implemented", "NotImplemented"),
    "502 of a proxy": said(b"<html>bad gateway</html>", status="502 Bad Gateway", ending="close"),
    "503": refused("503 Service Unavailable", "SlowDown"),
    "no date": said(b""),
    "a date": said(b"", Last_Modified="Wed, 21 Oct 2015 07:28:00 GMT"),
    "no such date": said(b"", Last_Modified="Wed, 31 Feb 2015 07:28:00 GMT"),
}


@pytest.fixture(scope="module")
def scripted_pair(lasting_server: RawServer) -> Iterator[tuple[Store, Store]]:
    """Both stores, of a bucket on the server."""
    options = StoreOptions(lasting_server.url, "eu-west-1", *SECRETS)
    location = locate("s3://bucket/prefix", options)
    pair = S3Store(location, options), ReadingS3Store(location, options)
    yield pair
    for store in pair:
        store.close()


@pytest.mark.parametrize(
    ("situation", "read"),
    [(name, read) for name in SITUATIONS for read in READS if "date" not in name or read == "head"],
)
def test_the_same_answer_means_the_same(
    scripted_pair: tuple[Store, Store], server: RawServer, situation: str, read: str
):
    """The very bytes of a server, good, wrong or refusing, give the value or error that the store with boto3 gives.

    But for one: boto3's takes part of an object, or no content, for all of it.
    """
    answer = SITUATIONS[situation]
    if read == "head":
        head = answer.pieces[0].partition(b"\r\n\r\n")[0]
        answer = Said((head + b"\r\nConnection: close\r\n\r\n",), "close")
    found = []
    for store in scripted_pair:
        server.answers = [answer] * 3  # boto3 asks once more where a bucket lives
        found.append(outcome(lambda store=store: READS[read](store)))  # type: ignore[misc]
    if read == "get" and b" 20" in answer.pieces[0][:11] and b" 200 " not in answer.pieces[0][:13]:
        assert found[1] == (StoreTransientError, "k")
    else:
        assert found[1] == found[0]


def test_wrong_credentials_are_refused_by_a_server_that_checks(
    s3_bucket: str, s3_endpoint: str, s3_options: StoreOptions
):
    """A server that computes signatures itself takes ours, and one made with another secret is AccessDeniedError."""
    import boto3

    iam = boto3.client(
        "iam", endpoint_url=s3_endpoint, region_name="us-east-1", aws_access_key_id="id", aws_secret_access_key="secret"
    )
    name = f"user-{s3_bucket}"
    iam.create_user(UserName=name)
    policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}
    iam.put_user_policy(UserName=name, PolicyName="all", PolicyDocument=json.dumps(policy))
    made = iam.create_access_key(UserName=name)["AccessKey"]
    iam.close()
    right = s3_options._replace(access_key_id=made["AccessKeyId"], secret_access_key=made["SecretAccessKey"])
    wrong = right._replace(secret_access_key="another-secret")
    readers = [S3Reader(locate(f"s3://{s3_bucket}/a=b", given), given) for given in (right, wrong)]
    writer = open_store(f"s3://{s3_bucket}/a=b", s3_options)
    writer.put("c=d", b"data")
    writer.close()
    _check_signatures(s3_endpoint, "0")
    try:
        assert readers[0].get("c=d").data == b"data"
        assert readers[0].head("c=d").size_bytes == 4
        for read in (readers[1].get, readers[1].head):
            with pytest.raises(AccessDeniedError):
                read("c=d")
    finally:
        _check_signatures(s3_endpoint, "inf")
        for each in readers:
            each.close()


def _check_signatures(endpoint: str, unchecked_requests: str) -> None:
    url = f"{endpoint}/moto-api/reset-auth"
    plain = {"Content-Type": "text/plain"}
    request = urllib.request.Request(url, data=unchecked_requests.encode(), headers=plain, method="POST")
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.status == 200


# --- what is sent --------------------------------------------------------------------------------------------------


def test_a_read_is_one_signed_request(server: RawServer, reader: S3Reader):
    """Path-style and encoded; host, time, token, hash and range as headers; no body, no secret."""
    server.answers = [said_range(5, b"0123456789", 100)]
    target = bytearray(10)
    reader.read_into("a=b/k", memoryview(target), offset_bytes=5)
    (asked,) = server.asked
    assert asked.line == "GET /bucket/prefix/a%3Db/k HTTP/1.1"
    assert bytes(target) == b"0123456789"
    assert asked.headers["range"] == "bytes=5-14"
    assert asked.headers["host"] == f"127.0.0.1:{server.port}"
    assert asked.headers["x-amz-security-token"] == SECRETS[2]
    assert f"Credential={SECRETS[0]}/" in asked.headers["authorization"]
    assert not {"content-length", "transfer-encoding", "expect"} & set(asked.headers)
    assert SECRETS[1] not in str(asked)


def test_a_head_asks_for_no_body(server: RawServer, reader: S3Reader):
    """Head is one HEAD, and the length in its answer, which no body follows, leaves the connection usable."""
    modified = "Wed, 21 Oct 2015 07:28:00 GMT"
    answer = said(announced=7, Last_Modified=modified)
    server.answers = [answer, answer]
    assert reader.head("k") == reader.head("k") == ("k", 7, 1445412480.0)
    assert [asked.line.split()[0] for asked in server.asked] == ["HEAD", "HEAD"]
    assert len({asked.connection for asked in server.asked}) == 1


@pytest.mark.parametrize(
    ("path", "prefix", "expected"),
    [("", "", "/bucket/k"), ("/", "/p", "/bucket/p/k"), ("/base/of~it/", "/p/q", "/base/of~it/bucket/p/q/k")],
)
def test_the_endpoint_may_have_a_path(server: RawServer, path: str, prefix: str, expected: str):
    """The bucket comes after the endpoint's own path, the prefix after the bucket."""
    reader = reader_of(server, path=path, prefix=prefix)
    server.answers = [said(b"data")]
    reader.get("k")
    assert server.asked[0].line == f"GET {expected} HTTP/1.1"
    reader.close()


def test_an_ipv6_address_can_be_the_endpoint():
    """The brackets of the URL are in the Host header and not in the address that is connected to."""
    with RawServer(host="::1") as server:
        reader = reader_of(server)
        server.answers = [said(b"data")]
        assert reader.get("k").data == b"data"
        assert server.asked[0].headers["host"] == f"[::1]:{server.port}"
        reader.close()


@pytest.mark.parametrize("name", ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"])
def test_a_proxy_of_the_environment_is_not_used(server: RawServer, monkeypatch: pytest.MonkeyPatch, name: str):
    """The server itself is asked, and its host is in no absolute request line."""
    for spelt in (name, name.lower()):
        monkeypatch.setenv(spelt, "http://127.0.0.1:9")
    reader = reader_of(server)
    server.answers = [said(b"data")]
    assert reader.get("k").data == b"data"
    reader.close()


@pytest.mark.parametrize(
    ("url", "expected", "authority"),
    [
        ("https://host", Endpoint(True, "host", 443, ""), "host"),
        ("https://Host.example:443/", Endpoint(True, "host.example", 443, ""), "host.example"),
        ("http://localhost:80/a/b", Endpoint(False, "localhost", 80, "/a/b"), "localhost"),
        ("HTTP://127.0.0.1:5000", Endpoint(False, "127.0.0.1", 5000, ""), "127.0.0.1:5000"),
        ("https://[::1]", Endpoint(True, "::1", 443, ""), "[::1]"),
        ("https://[::1]:9000/x", Endpoint(True, "::1", 9000, "/x"), "[::1]:9000"),
        ("https://host:", Endpoint(True, "host", 443, ""), "host"),
    ],
)
def test_an_endpoint_is_taken_apart(url: str, expected: Endpoint, authority: str):
    """Scheme, host, port and path; the Host header has the port only where it is not the scheme's own."""
    assert endpoint_of(url) == expected
    assert endpoint_of(url).authority == authority


@pytest.mark.parametrize(
    "url", ["ftp://host", "https://", "https://a b", "https://host/ä", "https://h/\r\nX: y", "//h"]
)
def test_an_endpoint_that_cannot_be_asked_is_refused(url: str):
    """What does not fit in a request line or is no URL is StoreSetupError."""
    with pytest.raises(StoreSetupError):
        endpoint_of(url)


@pytest.mark.parametrize("place", range(3))
def test_a_credential_cannot_bring_a_header(place: int):
    """A line break or a space in an id, secret or token is refused, without repeating it."""
    secrets = [*SECRETS]
    secrets[place] = "planted\r\nX-Evil: yes"
    options = StoreOptions("https://example.org", "auto", *secrets)
    with pytest.raises(StoreSetupError) as caught:
        S3Reader(locate("s3://bucket", options), options)
    assert "planted" not in str(caught.value)


# --- connections ---------------------------------------------------------------------------------------------------


def test_a_connection_is_used_again(server: RawServer, reader: S3Reader):
    """Whole objects, parts, heads and refusals that were read to their end follow each other on one connection."""
    missing = said(b"<Error><Code>NoSuchKey</Code></Error>", status="404 Not Found")
    server.answers = [said(b"a"), missing, said_range(5, b"0123456789", 100), said(b"")]
    assert reader.get("k").data == b"a"
    with pytest.raises(ObjectMissingError):
        reader.get("k")
    assert ten_bytes(reader) == b"0123456789"
    assert reader.get("k").data == b""
    assert len(server.asked) == 4
    assert len({asked.connection for asked in server.asked}) == 1


@pytest.mark.parametrize(
    "answer",
    [
        said(b"data", ending="close"),
        said(b"data", ending="reset"),
        said(b"data", Connection="close"),
        Said((b"HTTP/1.0 200 OK\r\nETag: x\r\nContent-Length: 4\r\n\r\ndata",)),
        said(b"data and more", announced=4),
        Said((said(b"data").pieces[0], b"HTTP/1.1 200 OK\r\nETag: x\r\nContent-Length: 4\r\n\r\nevil")),
    ],
)
def test_a_connection_that_is_over_is_not_used(server: RawServer, reader: S3Reader, answer: Said):
    """After an end, announced or not, and after bytes that nobody asked for, the next read has a connection of its own."""
    server.answers = [answer, said(b"next")]
    assert reader.get("k").data == b"data"
    _wait_until_something_came(reader, answer)
    assert reader.get("k").data == b"next"
    assert len({asked.connection for asked in server.asked}) == 2


def _wait_until_something_came(reader: S3Reader, answer: Said) -> None:
    """Until the end, or the bytes too many, of an answer are at the connection that lies idle, if it does."""
    import select

    for wire in reader._http._idle:
        poll = select.poll()
        poll.register(wire._socket, select.POLLIN)
        assert poll.poll(10_000)


def test_a_failure_gives_up_idle_connections(server: RawServer):
    """Two idle connections, of which one fails: the other, which the same may have befallen, is not tried."""
    reader = reader_of(server, limits=SHORT)
    both_wait = threading.Barrier(2)
    server.answers = [said(b"x" * 5), said(b"x" * 5)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: (both_wait.wait(10), _hold(reader, both_wait)), range(2)))
    assert len(reader._http._idle) == 2
    server.answers = [Said((), "hold")]
    with pytest.raises(StoreTransientError):
        reader.get("k")
    assert reader._http._idle == []
    reader.close()


def _hold(reader: S3Reader, barrier: threading.Barrier) -> None:
    """One read, not over before every other thread has begun its own."""
    with reader._asked("GET", "k") as answer:
        barrier.wait(10)
        answer.read_into(memoryview(bytearray(5)))


def test_threads_do_not_mix_their_answers(server: RawServer, reader: S3Reader):
    """Eight threads read at once: every target is filled with one answer, every answer is read once."""
    server.answers = [said_range(0, bytes([number]) * 300_000, 300_000) for number in range(40)]

    def read(_: int) -> set[int]:
        target = bytearray(300_000)
        reader.read_into("k", memoryview(target))
        return set(target)

    with ThreadPoolExecutor(8) as pool:
        values = list(pool.map(read, range(40)))
    assert all(len(value) == 1 for value in values)
    assert set().union(*values) == set(range(40))
    assert len({asked.connection for asked in server.asked}) <= 8


def test_closing_closes_every_connection(server: RawServer):
    """Idle connections end at once, one in use when its answer was read."""
    reader = reader_of(server)
    server.answers = [said(b"12345"), said(b"data")]
    with reader._asked("GET", "k") as answer:
        reader.get("k")
        (idle,) = reader._http._idle
        reader.close()
        assert idle._socket.fileno() == -1
        target = bytearray(5)
        answer.read_into(memoryview(target))
    assert bytes(target) == b"12345"
    assert reader._http._idle == []


def test_nobody_listening_is_transient():
    """A refused connection may pass; the error names the store and the key."""
    with RawServer() as server:
        reader = reader_of(server)
    with pytest.raises(StoreTransientError, match=r"s3://bucket/prefix.*'k'") as caught:
        reader.get("k")
    assert caught.value.key == "k"


def test_a_host_that_nobody_knows_is_transient():
    """A name that cannot be looked up may be known later."""
    options = StoreOptions("https://there-is-no-such-host.invalid", "auto", *SECRETS)
    with pytest.raises(StoreTransientError):
        S3Reader(locate("s3://bucket", options), options).get("k")


# --- what is not believed ------------------------------------------------------------------------------------------

HOSTILE = {
    "nothing": Said((), "close"),
    "reset": Said((), "reset"),
    "another protocol": Said((b"SSH-2.0-OpenSSH_9.6\r\n",)),
    "no version": Said((b"HTTP 200 OK\r\n\r\n",)),
    "HTTP/2": Said((b"HTTP/2 200 OK\r\n\r\n",)),
    "HTTP/0.9": Said((b"<html>hello</html>",)),
    "no number": Said((b"HTTP/1.1 OK\r\n\r\n",)),
    "a long number": Said((b"HTTP/1.1 2000 OK\r\n\r\n",)),
    "no status": Said((b"HTTP/1.1 099 OK\r\n\r\n",)),
    "half a head": Said((OK_HEAD + b"ETag: x\r\n",), "close"),
    "half a status": Said((b"HTTP/1.",), "close"),
    "bare line feeds": Said((b"HTTP/1.1 200 OK\nETag: x\nContent-Length: 4\n\ndata",), "close"),
    "a folded field": Said((OK_HEAD + b"ETag: x\r\n y\r\nContent-Length: 4\r\n\r\ndata",)),
    "a field without a name": Said((OK_HEAD + b": x\r\nETag: x\r\nContent-Length: 4\r\n\r\ndata",)),
    "a space before the colon": Said((OK_HEAD + b"ETag : x\r\nContent-Length: 4\r\n\r\ndata",)),
    "a field without a colon": Said((OK_HEAD + b"ETag: x\r\nwhat\r\nContent-Length: 4\r\n\r\ndata",)),
    "a NUL": Said((OK_HEAD + b"ETag: x\0\r\nContent-Length: 4\r\n\r\ndata",)),
    "two lengths": Said((OK_HEAD + b"ETag: x\r\nContent-Length: 4\r\ncontent-length: 5\r\n\r\ndata5",)),
    "a negative length": Said((OK_HEAD + b"ETag: x\r\nContent-Length: -4\r\n\r\ndata",)),
    "a signed length": Said((OK_HEAD + b"ETag: x\r\nContent-Length: +4\r\n\r\ndata",)),
    "a list of lengths": Said((OK_HEAD + b"ETag: x\r\nContent-Length: 4, 4\r\n\r\ndata",)),
    "a length in other digits": Said((OK_HEAD + b"ETag: x\r\nContent-Length: \xb2\r\n\r\ndata",)),
    "an endless length": Said((OK_HEAD + b"ETag: x\r\nContent-Length: " + b"9" * 30 + b"\r\n\r\ndata",)),
    "no length": Said((OK_HEAD + b"ETag: x\r\n\r\ndata",), "close"),
    "chunks": Said((OK_HEAD + b"ETag: x\r\nTransfer-Encoding: chunked\r\n\r\n4\r\ndata\r\n0\r\n\r\n",)),
    "chunks and a length": Said(
        (OK_HEAD + b"ETag: x\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n4\r\ndata\r\n0\r\n\r\n",)
    ),
    "a huge length": Said((OK_HEAD + b"ETag: x\r\nContent-Length: 100000000000000000\r\n\r\ndata",), "close"),
    "another protocol asked for": Said((b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n",), "close"),
    "many fields": Said(
        (OK_HEAD + b"X: y\r\n" * (HEAD_BYTES // 6 + 1000) + b"ETag: x\r\nContent-Length: 4\r\n\r\ndata",)
    ),
    "a long field": Said((OK_HEAD + b"X: " + b"y" * 2 * HEAD_BYTES + b"\r\nETag: x\r\nContent-Length: 4\r\n\r\ndata",)),
    "no end of announcements": Said((b"HTTP/1.1 100 Continue\r\n\r\n" * 100,)),
    "a refusal that ends early": Said((b"HTTP/1.1 404 Not Found\r\nContent-Length: 100\r\n\r\n<Error>",), "close"),
    "half a chunk of a refusal": Said(
        (b"HTTP/1.1 404 Not Found\r\nTransfer-Encoding: chunked\r\n\r\n40\r\n<Error>",), "close"
    ),
}


@pytest.mark.parametrize("situation", HOSTILE)
@pytest.mark.parametrize("read", ["get", "read_into"])
def test_what_is_no_answer_is_transient(server: RawServer, reader: S3Reader, situation: str, read: str):
    """Garbage, ambiguous lengths, chunks, heads without an end: StoreTransientError, and the next read is a fresh one."""
    server.answers = [HOSTILE[situation]]
    if (situation, read) == ("a huge length", "get"):  # larger than any object of ours, and told before it is taken
        expected: Any = pytest.raises(BlobCorruptError, match="'k' has 100000000000000000 bytes, more than")
    else:
        expected = pytest.raises(StoreTransientError, match=r"s3://bucket/prefix.*'k'|'k'.*s3://bucket/prefix")
    with expected as caught:
        READS[read](reader)
    assert caught.value.key == "k"
    server.answers = [said(b"good")]
    assert reader.get("k").data == b"good"
    assert len({asked.connection for asked in server.asked}) == 2


@given(
    garbage=st.binary(max_size=400), after=st.sampled_from([b"", OK_HEAD, b"HTTP/1.1 206 x\r\nContent-Length: 10\r\n"])
)
def test_any_bytes_end_in_an_error_of_ours(lasting_server: RawServer, garbage: bytes, after: bytes):
    """Whatever comes before an early end is an answer or an error of coldstart, never another exception."""
    reader = reader_of(lasting_server)
    lasting_server.answers = [Said((after + garbage,), "close")] * 2
    for read in ("get", "read_into"):
        found = outcome(lambda read=read: READS[read](reader))  # type: ignore[misc]
        assert not isinstance(found, tuple) or isinstance(found, StoredObject) or found[1] == "k"
    reader.close()


@pytest.mark.parametrize(
    "announcement", [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"]
)
def test_an_announcement_is_passed_over(server: RawServer, reader: S3Reader, announcement: bytes):
    """An informational answer, also in the same packet, is followed by the one that counts."""
    (answer,) = said(b"data").pieces
    server.answers = [Said((announcement + announcement + answer,)), Said((announcement, answer))]
    assert reader.get("k") == StoredObject(b"data", '"e"')
    assert reader.get("k") == StoredObject(b"data", '"e"')


def test_an_answer_may_come_byte_by_byte(server: RawServer, reader: S3Reader):
    """Where packets begin and end means nothing."""
    whole = said_range(5, b"0123456789", 100).pieces[0]
    server.answers = [Said(tuple(whole[at : at + 1] for at in range(len(whole))))]
    assert ten_bytes(reader) == b"0123456789"


def test_the_code_of_a_chunked_refusal_is_read(server: RawServer, reader: S3Reader):
    """AWS sends refusals in chunks: the code is found also where it spans two."""
    head = b"HTTP/1.1 404 Not Found\r\nTransfer-Encoding: chunked\r\n\r\n"
    server.answers = [Said((head, b"f;x=y\r\n<Error><Code>No\r\n", b"16\r\nSuchBucket</Code></Err\r\n0\r\n\r\n"))]
    with pytest.raises(StoreSetupError, match="NoSuchBucket"):
        reader.get("k")


@pytest.mark.parametrize("framing", ["Content-Length: 10000000", "Transfer-Encoding: chunked", "X: y"])
def test_of_a_long_refusal_the_beginning_is_read(server: RawServer, reader: S3Reader, framing: str):
    """A refusal without an end is judged by its first bytes, whatever its framing."""
    text = b"<Error><Code>SlowDown</Code>" + b"x" * 2 * REFUSAL_BYTES
    if "chunked" in framing:
        text = b"989680\r\n" + text
    server.answers = [Said((f"HTTP/1.1 503 Busy\r\n{framing}\r\n\r\n".encode() + text,), "hold")]
    with pytest.raises(StoreTransientError, match="SlowDown"):
        reader.get("k")


@pytest.mark.parametrize("status", ["301 Moved Permanently", "307 Temporary Redirect", "302 Found", "308 x"])
def test_a_redirect_is_not_followed(server: RawServer, reader: S3Reader, status: str):
    """A redirect is an error, and nobody else is asked."""
    with RawServer() as other:
        server.answers = [said(status=status, Location=f"{other.url}/bucket/k", Connection="close")]
        with pytest.raises(StoreError):
            reader.get("k")
        assert other.asked == []


@pytest.mark.parametrize("status", ["301 Moved Permanently", "307 Temporary Redirect", "400 Bad Request"])
@pytest.mark.parametrize("read", READS)
def test_the_region_that_a_server_names_is_in_the_error(server: RawServer, reader: S3Reader, status: str, read: str):
    """A bucket of another region is StoreSetupError with the setting and its value, for a HEAD too."""
    server.answers = [said(status=status, x_amz_bucket_region="ap-south-2", Connection="close")]
    with pytest.raises(StoreSetupError, match="COLDSTART_REGION to ap-south-2") as caught:
        READS[read](reader)
    assert caught.value.key == "k"


@pytest.mark.parametrize(
    "answer",
    [
        said(status="307 x", Location="https://bucket.s3.ap-south-2.amazonaws.com/prefix/k?x=y", Connection="close"),
        said(b"<Error><Endpoint>bucket.s3.ap-south-2.amazonaws.com</Endpoint></Error>", status="301 Moved"),
        said(b"<Error><Endpoint>s3.ap-south-2.amazonaws.com</Endpoint></Error>", status="301 Moved"),
    ],
)
def test_the_endpoint_that_a_server_names_is_in_the_error(server: RawServer, reader: S3Reader, answer: Said):
    """A redirect to another endpoint of AWS names it, without the bucket, as it can be set."""
    server.answers = [answer]
    with pytest.raises(StoreSetupError, match=r"COLDSTART_ENDPOINT_URL to https://s3\.ap-south-2\.amazonaws\.com$"):
        reader.get("k")


@pytest.mark.parametrize(
    "answer",
    [
        said(status="301 x", x_amz_bucket_region="evil region; rm", Connection="close"),
        said(status="301 x", x_amz_bucket_region="eu-west-1", Connection="close"),
        said(status="302 x", Location="https://evil.example.org/", Connection="close"),
        said(status="302 x", Location="https://evil.org/.amazonaws.com/", Connection="close"),
        refused("301 \x1b[31mevil", "evil code"),
    ],
)
def test_what_else_a_redirect_says_is_not_shown(server: RawServer, reader: S3Reader, answer: Said):
    """Hosts that are nobody's we know, and regions that are none or ours, are not in the error."""
    server.answers = [answer]
    with pytest.raises(StoreError) as caught:
        reader.get("k")
    assert "evil" not in str(caught.value)
    assert "eu-west-1" not in str(caught.value)


@pytest.mark.parametrize("situation", [*HOSTILE, *SITUATIONS])
def test_no_error_shows_a_secret(server: RawServer, reader: S3Reader, situation: str):
    """Neither the text nor the traceback of any failure has the id, the secret or the token, even if the server echoes."""
    server.answers = [(HOSTILE | SITUATIONS)[situation]] * 2
    for read in ("get", "read_into"):
        try:
            READS[read](reader)
        except ColdstartError as error:
            shown = "".join(traceback.format_exception(error)) + repr(error)
            assert not [secret for secret in SECRETS if secret in shown]


def test_the_store_shows_no_secret():
    """repr, url and the attributes of the store hold its address and no credential."""
    options = StoreOptions("https://example.org", "auto", *SECRETS)
    store = ReadingS3Store(locate("s3://bucket/prefix", options), options)
    shown = repr(store) + store.url + repr(vars(store)) + repr(vars(store._reader)) + repr(vars(store._reader._http))
    assert not [secret for secret in SECRETS if secret in shown]
    assert repr(store) == "ReadingS3Store('s3://bucket/prefix')"


# --- how long ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tls_server(certificate: Path) -> Iterator[RawServer]:
    """A server that speaks TLS with that certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with RawServer(context) as server:
        yield server


@pytest.fixture(params=["at once", "in turns", "tls"])
def wire(
    request: pytest.FixtureRequest,
    server: RawServer,
    tls_server: RawServer,
    certificate: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> RawServer:
    """A server for each way in which bytes are received."""
    if request.param == "tls":
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
        tls_server.answers.clear()
        tls_server.asked.clear()
        return tls_server
    if request.param == "in turns":
        monkeypatch.setattr(http1, "_WAITS_FOR_ALL", False)
    return server


def test_a_large_range_is_received_whole(wire: RawServer):
    """Megabytes, not a round number of them, land in their place and nowhere else, and the connection stays usable."""
    body = bytes(range(256)) * (3 << 12) + b"end"
    reader = reader_of(wire)
    wire.answers = [said_range(7, body, len(body) + 7), said(body)]
    buffer = bytearray(len(body) + 20)
    reader.read_into("k", memoryview(buffer)[10:-10], offset_bytes=7)
    assert buffer == bytes(10) + body + bytes(10)
    assert reader.get("k").data == body
    assert len({asked.connection for asked in wire.asked}) == 1
    reader.close()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Said((), "hold"), "too long to answer"),
        (Said((b"HTTP/1.1 206",), "hold"), "too long to answer"),
        (Said(tuple(b"HTTP/1.1 206 OK\r\n" + b"X: y\r\n" * 50), "hold", 0.05), "too long to answer"),
        (said(b"", announced=10, status="206 x", Content_Range="bytes 5-14/100", ending="hold"), "too slowly"),
        (said(b"half!", announced=10, status="206 x", Content_Range="bytes 5-14/100", ending="hold"), "too slowly"),
        (Said((b"HTTP/1.1 503 x\r\nContent-Length: 10\r\n\r\nhalf!",), "hold"), "too slowly"),
        (Said((b"HTTP/1.1 503 x\r\n\r\nhalf!",), "hold"), "too long to answer"),
    ],
)
def test_silence_is_transient(wire: RawServer, answer: Said, reason: str):
    """A server that says nothing, or stops in the middle of head, body or refusal, is given up by its limit."""
    limits = SHORT if "answer" in reason else SHORT._replace(answer_seconds=20)
    reader = reader_of(wire, limits=limits)
    pieces = tuple(bytes([piece]) if isinstance(piece, int) else piece for piece in answer.pieces)
    wire.answers = [answer._replace(pieces=pieces)]
    with pytest.raises(StoreTransientError, match=reason):
        ten_bytes(reader)
    reader.close()


def test_a_trickle_is_transient(wire: RawServer):
    """A server that always sends something soon, and never much, is given up by the floor, long before the body's end."""
    reader = reader_of(wire, limits=SHORT._replace(answer_seconds=20))
    head = said_range(0, bytes(2000), 2000).pieces[0][:-2000]
    wire.answers = [Said((head, *[b"x"] * 2000), "hold", 0.02)]
    with pytest.raises(StoreTransientError, match="too slowly"):
        reader.read_into("k", memoryview(bytearray(2000)))
    reader.close()


def test_a_slow_body_above_the_floor_is_read(wire: RawServer):
    """A body that takes several windows, each of them above the floor, is complete."""
    limits = SHORT._replace(answer_seconds=20, floor_bytes_per_second=4.0, floor_window_seconds=0.5)
    reader = reader_of(wire, limits=limits)
    body = bytes(range(250)) * 4
    head = said_range(0, body, len(body)).pieces[0][: -len(body)]
    wire.answers = [Said((head, *(body[at : at + 50] for at in range(0, len(body), 50))), "keep", 0.07)]
    target = bytearray(len(body))
    reader.read_into("k", memoryview(target))
    assert target == body
    reader.close()


def test_the_deadline_ends_a_body_above_the_floor(wire: RawServer):
    """However steadily bytes come, a request ends at its deadline."""
    limits = SHORT._replace(answer_seconds=20, floor_bytes_per_second=1.0, deadline_seconds=1.0)
    reader = reader_of(wire, limits=limits)
    head = said_range(0, bytes(2000), 2000).pieces[0][:-2000]
    wire.answers = [Said((head, *[b"x"] * 2000), "hold", 0.02)]
    with pytest.raises(StoreTransientError, match="longer than 1 s"):
        reader.read_into("k", memoryview(bytearray(2000)))
    reader.close()


# --- TLS -----------------------------------------------------------------------------------------------------------


def test_the_system_may_be_told_whom_to_trust(
    tls_server: RawServer, certificate: Path, monkeypatch: pytest.MonkeyPatch
):
    """SSL_CERT_FILE works as OpenSSL has it, for the host's name and for its address."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    for url in (tls_server.url, f"https://localhost:{tls_server.port}"):
        options = StoreOptions(url, "auto", *SECRETS)
        reader = S3Reader(locate("s3://bucket", options), options)
        tls_server.answers = [said(b"data")]
        assert reader.get("k").data == b"data"
        reader.close()


def test_a_certificate_that_is_not_trusted_is_a_setup_error(tls_server: RawServer):
    """A self-signed certificate that nobody vouches for ends the call for good, before anything is sent."""
    tls_server.asked.clear()
    reader = reader_of(tls_server)
    with pytest.raises(StoreSetupError, match="does not trust the certificate") as caught:
        reader.get("k")
    assert caught.value.key == "k"
    assert tls_server.asked == []


def test_a_certificate_of_another_host_is_a_setup_error(
    tls_server: RawServer, certificate: Path, monkeypatch: pytest.MonkeyPatch
):
    """A trusted certificate for a name that was not asked for is refused, before anything is sent."""
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
    tls_server.asked.clear()
    options = StoreOptions(f"https://127.0.0.2:{tls_server.port}", "auto", *SECRETS)
    with RawServer(tls_server._context, host="127.0.0.2") as server:
        options = options._replace(endpoint_url=server.url)
        with pytest.raises(StoreSetupError, match="does not trust the certificate"):
            S3Reader(locate("s3://bucket", options), options).get("k")
        assert server.asked == []


def test_a_server_without_tls_is_transient(server: RawServer):
    """A handshake that is answered with something else fails as a connection does."""
    options = StoreOptions(f"https://127.0.0.1:{server.port}", "auto", *SECRETS)
    server.answers = [said(b"plain")]
    with pytest.raises(StoreTransientError):
        S3Reader(locate("s3://bucket", options), options, limits=SHORT._replace(connect_seconds=0.5)).get("k")


@pytest.mark.parametrize("content", [None, "", "no certificate"])
def test_a_bundle_that_cannot_be_read_is_a_setup_error(
    tls_server: RawServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
):
    """A file of certificates that is not there, or has none, is named."""
    bundle = tmp_path / "bundle.pem"
    if content is not None:
        bundle.write_text(content)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(bundle))
    with pytest.raises(StoreSetupError, match=r"bundle\.pem"):
        reader_of(tls_server).get("k")


def test_a_machine_without_certificates_uses_those_of_a_package(
    tls_server: RawServer, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Where the system has neither file nor folder of certificates, a package's are found without importing it."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "packages" / "certifi").mkdir(parents=True)
    (tmp_path / "packages" / "certifi" / "cacert.pem").write_text(certificate.read_text())
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "nothing"))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "empty"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "packages"), *sys.path])
    reader = reader_of(tls_server)
    tls_server.answers = [said(b"data")]
    assert reader.get("k").data == b"data"
    reader.close()


# --- where it is used ----------------------------------------------------------------------------------------------

KEYS = StoreOptions(access_key_id="id", secret_access_key="secret")


@pytest.mark.parametrize(
    ("url", "options", "expected"),
    [
        ("s3://bucket", KEYS._replace(region="eu-west-1"), True),
        ("s3://bucket", KEYS._replace(region="us-gov-west-1", session_token="token"), True),
        ("s3://bucket", KEYS._replace(endpoint_url="https://example.org"), True),
        ("s3://bucket", KEYS, True),
        ("r2://bucket", KEYS._replace(r2_account_id="account"), True),
        ("s3://bucket", KEYS._replace(region="us-iso-east-1"), False),
        ("s3://bucket", KEYS._replace(region="auto"), False),
        ("s3://bucket", KEYS._replace(region="auto", endpoint_url="https://example.org"), True),
        ("s3://bucket", StoreOptions(region="eu-west-1"), False),
        ("r2://bucket", StoreOptions(r2_account_id="account"), False),
    ],
)
def test_boto3_is_asked_only_for_what_is_not_known(url: str, options: StoreOptions, expected: bool):
    """Both keys with a known region or an endpoint are enough; anything else opens the store that uses boto3."""
    assert reads_directly(locate(url, options), options) is expected
    store = open_store(url, options)
    assert isinstance(store, RetryingStore)
    assert isinstance(innermost(store), ReadingS3Store if expected else S3Store)
    assert store.url == url
    store.close()


def test_a_region_of_the_aws_files_is_asked_of_boto3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without a region, a configuration of AWS on this machine may name one: then boto3 reads it, as it always did."""
    monkeypatch.setenv("HOME", str(tmp_path))
    options = KEYS._replace(endpoint_url="https://example.org")
    assert reads_directly(locate("s3://bucket", options), options)
    (tmp_path / ".aws").mkdir()
    assert not reads_directly(locate("s3://bucket", options), options)
    assert reads_directly(locate("r2://bucket", options), options)
    monkeypatch.setenv("HOME", str(tmp_path / "other"))
    monkeypatch.setenv("AWS_PROFILE", "work")
    assert not reads_directly(locate("s3://bucket", options), options)


def test_a_reader_of_what_is_not_known_is_refused():
    """S3Reader cannot be made without credentials."""
    with pytest.raises(StoreSetupError, match="both keys"):
        S3Reader(locate("s3://bucket", StoreOptions()), StoreOptions())


def test_the_endpoints_of_aws_are_those_of_botocore():
    """In every region that is asked directly, the host is the one that boto3 asks (in us-east-1 its regional form)."""
    import botocore.session
    from botocore.regions import EndpointResolver

    session = botocore.session.Session()
    regions = [name for partition in session.get_available_partitions() for name in
               session.get_available_regions("s3", partition)]  # fmt: skip
    resolver = EndpointResolver(session.get_data("endpoints"))
    asked = 0
    for region in regions:
        options = KEYS._replace(region=region)
        location = locate("s3://bucket", options)
        if reads_directly(location, options):
            asked += 1
            assert _endpoint(location, region).host == resolver.construct_endpoint("s3", region)["hostname"]
    assert asked >= 25


@given(moment=st.datetimes(datetime(1970, 1, 1), datetime(9999, 12, 31), timezones=st.just(UTC)))
def test_a_date_is_read_as_it_was_written(moment: datetime):
    """Any date of HTTP gives back its second."""
    moment = moment.replace(microsecond=0)
    assert _unix_seconds(format_datetime(moment, usegmt=True)) == moment.timestamp()


@given(text=st.text() | st.from_regex(r"[A-Z][a-z]{2}, \d\d (Jan|Feb|Mxx) \d{4} \d\d:\d\d:\d\d GMT", fullmatch=True))
def test_what_is_no_date_is_none(text: str):
    """Days and hours that do not exist, and any other text, are not read as a date."""
    found = _unix_seconds(text)
    assert found is None or format_datetime(datetime.fromtimestamp(found, UTC), usegmt=True)[4:] == text[4:]


# --- without boto3 -------------------------------------------------------------------------------------------------

_LIGHT = """
import json, sys
bare = set(sys.modules)
from coldstart.stores import StoreOptions, open_store
store = open_store(sys.argv[1], StoreOptions(sys.argv[2], "us-east-1", "id", "secret"))
store.read_into("k", memoryview(bytearray(4)))
store.get("k")
after_reading = set(sys.modules) - bare
if sys.argv[3] == "write":
    store.put("k", b"data")
print(json.dumps([sorted(after_reading), sorted(set(sys.modules) - bare)]))
"""
_HEAVY = {
    "boto3", "botocore", "pydantic", "structlog", "numpy", "dataclasses", "inspect", "asyncio", "subprocess", "logging",
    "email", "http", "pathlib", "random", "tempfile", "datetime", "calendar", "ssl",
}  # fmt: skip


def test_reading_imports_the_standard_library_and_little_of_it(s3_bucket: str, s3_options: StoreOptions):
    """In a fresh process, reading over HTTP imports nothing heavy, not even TLS; the first write imports boto3."""
    S3Store(locate(f"s3://{s3_bucket}/p", s3_options), s3_options).put("k", b"data")
    command = [sys.executable, "-c", _LIGHT, f"s3://{s3_bucket}/p", s3_options.endpoint_url, "write"]
    output = subprocess.run(command, check=True, capture_output=True, timeout=60).stdout
    after_reading, after_writing = json.loads(output)
    assert not _HEAVY & set(after_reading)
    assert {"boto3", "botocore"} <= set(after_writing)


def test_an_error_of_the_first_write_is_that_of_boto3s_store(monkeypatch: pytest.MonkeyPatch):
    """Without boto3 an opened store reads, and a write, deletion or listing says what to install."""
    monkeypatch.setitem(sys.modules, "boto3.session", None)
    options = KEYS._replace(endpoint_url="https://example.org")
    store = open_store("s3://bucket", options)
    for action in (lambda: store.put("k", b""), lambda: store.delete("k"), lambda: list(store.list(""))):
        with pytest.raises(StoreSetupError, match=r'pip install "coldstart-gpu\[s3\]"'):
            action()
    store.close()


_HANDLER = """
import sys
import numpy as np
from coldstart import coldstart

def load():
    return {"scale": np.arange(300_000, dtype=np.float32)}

@coldstart("light", load=load, warmup=[{"x": 2}])
def handler(event, model):
    heavy = sorted({"boto3", "botocore", "urllib3", "pydantic", "structlog"} & set(sys.modules))
    return {"sum": float(model["scale"].sum()), "heavy": heavy}
"""


def test_a_whole_restore_needs_no_boto3_before_its_answer(tmp_path: Path, s3_bucket: str, s3_options: StoreOptions):
    """A worker that restores from a bucket has imported neither boto3 nor its parts when it answers."""
    project = Project(tmp_path / "project")
    project.write(_HANDLER)
    project.environment = {
        "COLDSTART_STORE": f"s3://{s3_bucket}/snapshots",
        "COLDSTART_ENDPOINT_URL": s3_options.endpoint_url,
        "COLDSTART_REGION": s3_options.region,
        "COLDSTART_ACCESS_KEY_ID": s3_options.access_key_id,
        "COLDSTART_SECRET_ACCESS_KEY": s3_options.secret_access_key,
    }
    first, second = (project.run() for _ in range(2))
    assert first.kind == "cold", first.errors
    assert second.kind == "restored", (second.reason, first.errors)
    assert second.output == first.output
    assert second.output["heavy"] == []
    assert len(list(itertools.islice(_objects(s3_bucket, s3_options), 3))) == 3


def _objects(bucket: str, options: StoreOptions) -> Iterator[object]:
    store = open_store(f"s3://{bucket}/snapshots", options)
    yield from store.list("")
    store.close()
