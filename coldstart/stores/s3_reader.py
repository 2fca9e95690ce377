"""Reading from S3 and R2 without boto3, whose import alone would stand before the first byte of a restore.

``S3Reader`` reads: signed GETs and HEADs over connections of our own, straight into the caller's memory.
``ReadingS3Store`` is the whole store: it reads so itself, and makes a ``s3.S3Store`` for the first write, deletion or
listing. Both say of an object just what ``s3.S3Store`` says, in the same errors, with these differences:

- a redirect is never followed: it is an error that names the region or the endpoint to set, where the server says it;
- a whole object has status 200: boto3 takes a part of it (206) for the whole;
- it knows no proxies: where the environment names one, boto3 reads; and certificates are those that ``http1`` tells.
  ``AWS_CA_BUNDLE`` names a file of its own for both;
- a body slower than a floor, and a request longer than its deadline, are given up: see ``http1_answer.Limits``;
- a ranged read that lags behind others has a second request sent for it: see ``hedging``.

Where credentials, region or endpoint are only known to the AWS configuration of the machine (profiles, SSO, container
credentials), ``reads_directly`` says no, and boto3 does all.

No error text, repr or address of this module holds a credential.
"""

from __future__ import annotations

import os
import re
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from coldstart.config import read_variable
from coldstart.errors import BlobCorruptError, StoreError, StoreSetupError, StoreTransientError
from coldstart.stores.base import Capabilities, ObjectInfo, Store, StoredObject, check_key, check_size
from coldstart.stores.hedging import HedgeCounts, HedgePolicy, Hedger
from coldstart.stores.http1 import Endpoint, Http, Watch, endpoint_of
from coldstart.stores.http1_answer import Limits
from coldstart.stores.s3_errors import refusal, unreachable
from coldstart.stores.sigv4 import Signer, encode_path
from coldstart.terms import VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from coldstart.stores import StoreOptions
    from coldstart.stores.http1_answer import Answer
    from coldstart.stores.location import BucketLocation

_DEFAULT_REGION = "us-east-1"
_AWS_REGION = re.compile(r"(?:(?:us|eu|ap|sa|ca|me|af|il|mx)(?:-gov)?|cn)-[a-z]+-\d{1,2}")
"""Regions of which the endpoint is known here; those of other partitions are left to boto3."""
_AWS_FILES = ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_PROFILE", "AWS_DEFAULT_PROFILE")
_HEADER_TEXT = re.compile(r"[!-~]*")
_PIECE_BYTES = 16 << 20

_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)", re.ASCII)
_CODE = re.compile(rb"<Code>([A-Za-z0-9]{1,64})</Code>")
_SAID_REGION = re.compile(r"[a-z]{2}(?:-[a-z]{1,16}){1,3}-\d{1,2}")
_SAID_ENDPOINT = re.compile(
    rb"(?:https://|<Endpoint>)([a-z0-9.-]{1,200}\.(?:amazonaws\.com|cloudflarestorage\.com))[/<]"
)
_DATE = re.compile(r"[A-Z][a-z]{2}, (\d\d) ([A-Z][a-z]{2}) (\d{4}) (\d\d):(\d\d):(\d\d) GMT", re.ASCII)
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


_PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy")
"""Where one of these is set, boto3 reads: it knows proxies, and when not to use one."""


def reads_directly(location: BucketLocation, options: StoreOptions) -> bool:
    """Whether a bucket is read without boto3: all that ``S3Reader`` needs is known, and no proxy stands before it."""
    return _is_known(location, options) and not any(map(read_variable, _PROXIES))


def _is_known(location: BucketLocation, options: StoreOptions) -> bool:
    has_credentials = bool(options.access_key_id and options.secret_access_key)
    region = _region(location)
    return has_credentials and bool(region) and bool(location.endpoint_url or _AWS_REGION.fullmatch(region))


class S3Reader:
    """The reading half of the store contract, for one bucket and prefix. Raises StoreSetupError for what it cannot use.

    ``clock`` gives Unix seconds.
    """

    def __init__(
        self,
        location: BucketLocation,
        options: StoreOptions,
        *,
        limits: Limits = Limits(),  # noqa: B008  a frozen value
        hedging: HedgePolicy = HedgePolicy(),  # noqa: B008
        clock: Callable[[], float] = time.time,
    ) -> None:
        if not _is_known(location, options):
            raise StoreSetupError("reading without boto3 needs both keys, and a region or an endpoint that is known")
        secrets = (options.access_key_id, options.secret_access_key, options.session_token)
        if not all(_HEADER_TEXT.fullmatch(secret) for secret in secrets):
            raise StoreSetupError("the credentials of the store have characters that no credential has")
        self._bucket = location.bucket
        self._region = _region(location)
        self._endpoint = _endpoint(location, self._region)
        folders = "/".join(filter(None, (location.bucket, location.prefix)))
        self._root = f"{self._endpoint.path}/{encode_path(folders)}"
        self._http = Http(self._endpoint, limits=limits, ca_file=read_variable("AWS_CA_BUNDLE") or "")
        self._hedger = Hedger(hedging)
        self._signer = Signer(
            access_key_id=options.access_key_id,
            secret_access_key=options.secret_access_key,
            session_token=options.session_token,
            region=self._region,
        )
        self._clock = clock
        self.url = f"{location.scheme}://{location.bucket}/{location.prefix}".rstrip("/")

    def get(self, key: str) -> StoredObject:
        """One GET; the etag is the server's, as it sent it."""
        with self._asked("GET", key) as answer:
            length_bytes = answer.length_bytes
            if answer.status != 200 or length_bytes is None:  # noqa: PLR2004
                raise StoreTransientError(
                    f"{self.url} answered {answer.status} for {key!r}, with {length_bytes} as its length; "
                    "a proxy or cache in between may do that",
                    key=key,
                )
            check_size(key, length_bytes)
            etag = answer.headers.get("etag", "")
            if not etag:
                raise StoreTransientError(f"{self.url} answered without an ETag for {key!r}", key=key)
            return StoredObject(b"".join(_pieces(answer, length_bytes)), etag)

    def read_into(self, key: str, target: memoryview, *, offset_bytes: int = 0) -> None:
        """One ranged GET, received in ``target``, or a second one beside it; nothing lands there after the return."""
        if not len(target):
            self.head(key)  # an empty range cannot be asked for
            return
        end = offset_bytes + len(target) - 1

        def request(memory: memoryview, watch: Watch) -> None:
            with self._asked("GET", key, {"range": f"bytes={offset_bytes}-{end}"}, watch) as answer:
                self._check_range(answer, key, offset_bytes, end)
                answer.read_into(memory)

        self._hedger.read(request, target)

    def head(self, key: str) -> ObjectInfo:
        """One HEAD; the age is by the server's clock."""
        with self._asked("HEAD", key) as answer:
            size_bytes, modified = answer.length_bytes, _unix_seconds(answer.headers.get("last-modified", ""))
        if size_bytes is None or modified is None:
            raise StoreTransientError(f"{self.url} gave neither size nor age of {key!r}", key=key)
        return ObjectInfo(key, size_bytes, modified)

    @property
    def hedges(self) -> HedgeCounts:
        """Second requests of ranged reads so far."""
        return self._hedger.counts

    def close(self) -> None:
        """Close the connections; what has been asked for a second time is given up."""
        self._hedger.close()
        self._http.close()

    @contextmanager
    def _asked(
        self, method: str, key: str, more: dict[str, str] | None = None, watch: Watch | None = None
    ) -> Iterator[Answer]:
        """The answer to a signed request, unless it is a refusal; what goes wrong, in terms of the store contract."""
        path = f"{self._root}/{encode_path(check_key(key))}"
        signed = self._signer.headers(method, path, self._endpoint.authority, unix_seconds=self._clock())
        headers = {**signed, **(more or {}), "accept-encoding": "identity", "user-agent": f"coldstart/{VERSION}"}
        try:
            with self._http.ask(method, path, headers, watch) as answer:
                if answer.status >= 300:  # noqa: PLR2004
                    raise self._refusal(answer, method, key)
                yield answer
        except StoreError as error:
            if error.key is not None:
                raise
            advice = "; it may work when asked again" if isinstance(error, StoreTransientError) else ""
            raise type(error)(f"{self.url} could not give {key!r}: {error}{advice}", key=key) from None
        except OSError as error:
            raise unreachable(error, self.url, key) from None

    def _refusal(self, answer: Answer, method: str, key: str) -> Exception:
        text = b"" if method == "HEAD" else answer.read_refusal()
        if remedy := self._elsewhere(answer, text):
            return StoreSetupError(f"{self.url} answered {answer.status} for {key!r}: {remedy}", key=key)
        found = _CODE.search(text)
        refused = _Refused(
            {
                "ResponseMetadata": {"HTTPStatusCode": answer.status},
                "Error": {"Code": found[1].decode() if found else ""},
            }
        )
        return refusal(cast("Any", refused), self.url, key, conditional=False)

    def _elsewhere(self, answer: Answer, text: bytes) -> str:
        """What to set where the server says that the bucket is elsewhere, "" where it does not."""
        if answer.status >= 400 and answer.status != 400:  # noqa: PLR2004  400: how AWS answers a HEAD
            return ""
        region = answer.headers.get("x-amz-bucket-region", "")
        if region != self._region and _SAID_REGION.fullmatch(region):
            return f"the bucket lives in another region: set COLDSTART_REGION to {region}"
        where = answer.headers.get("location", "").encode("latin-1") + b"/\n" + text
        found = _SAID_ENDPOINT.search(where) if answer.status < 400 else None  # noqa: PLR2004
        if found is None:
            return ""
        host = found[1].decode().removeprefix(f"{self._bucket}.")
        return f"redirects are not followed: set COLDSTART_ENDPOINT_URL to https://{host}"

    def _check_range(self, answer: Answer, key: str, start: int, end: int) -> None:
        parts = _CONTENT_RANGE.fullmatch(answer.headers.get("content-range", ""))
        if parts and parts[3] != "*" and int(parts[3]) <= end:
            raise BlobCorruptError(
                f"{key!r} in {self.url} has {parts[3]} bytes, bytes {start}-{end} were asked for", key=key
            )
        exact = parts and (int(parts[1]), int(parts[2])) == (start, end) and answer.length_bytes == end - start + 1
        if answer.status != 206 or not exact:  # noqa: PLR2004
            raise StoreTransientError(
                f"{self.url} was asked for bytes {start}-{end} of {key!r} and answered {answer.status} with others; "
                "a proxy or cache in between may do that",
                key=key,
            )


class ReadingS3Store(Store):
    """Objects of one bucket below one prefix, read without boto3 and written with it, which is imported then.

    ``capabilities``: as for ``s3.S3Store``. A write raises StoreSetupError where boto3 is missing.
    """

    def __init__(
        self,
        location: BucketLocation,
        options: StoreOptions,
        *,
        capabilities: Capabilities = Capabilities(create_if_absent=True, compare_and_swap=True, ranges=True),  # noqa: B008
        limits: Limits = Limits(),  # noqa: B008
        hedging: HedgePolicy = HedgePolicy(),  # noqa: B008
    ) -> None:
        self._location = location
        self._options = options
        self._capabilities = capabilities
        self._reader = S3Reader(location, options, limits=limits, hedging=hedging)
        self._writer: Store | None = None
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """Scheme, bucket and prefix; neither endpoint nor credentials."""
        return self._reader.url

    @property
    def capabilities(self) -> Capabilities:
        """What the constructor was given."""
        return self._capabilities

    @property
    def hedges(self) -> HedgeCounts:
        """Second requests of ranged reads so far."""
        return self._reader.hedges

    def __repr__(self) -> str:
        return f"ReadingS3Store({self.url!r})"

    def get(self, key: str) -> StoredObject:
        """One GET, without boto3."""
        return self._reader.get(key)

    def read_into(self, key: str, target: memoryview, *, offset_bytes: int = 0) -> None:
        """One ranged GET, received in ``target``, or a second one beside it, without boto3."""
        self._reader.read_into(key, target, offset_bytes=offset_bytes)

    def head(self, key: str) -> ObjectInfo:
        """One HEAD, without boto3."""
        return self._reader.head(key)

    def put(self, key: str, data: bytes | memoryview, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """One PUT, by boto3."""
        return self._writing().put(key, data, if_absent=if_absent, if_match=if_match)

    def delete(self, key: str) -> None:
        """One DELETE, by boto3."""
        self._writing().delete(key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """A page of up to 1000 objects a request, by boto3."""
        return self._writing().list(prefix)

    def close(self) -> None:
        """Close the connections of both."""
        self._reader.close()
        with self._lock:
            if self._writer is not None:
                self._writer.close()

    def _writing(self) -> Store:
        with self._lock:
            if self._writer is None:
                from coldstart.stores.s3 import S3Store

                self._writer = S3Store(self._location, self._options, capabilities=self._capabilities)
            return self._writer


class _Refused(NamedTuple):
    """A refusal as boto3 would raise it, which is the form that ``s3_errors`` knows."""

    response: dict[str, dict[str, object]]


def _region(location: BucketLocation) -> str:
    """The region to sign for, "" where AWS files of this machine may name one, which boto3 reads."""
    if location.region:
        return location.region
    has_files = any(map(read_variable, _AWS_FILES)) or os.path.exists(os.path.expanduser("~/.aws"))
    return "" if has_files else _DEFAULT_REGION


def _endpoint(location: BucketLocation, region: str) -> Endpoint:
    if location.endpoint_url:
        return endpoint_of(location.endpoint_url)
    domain = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
    return Endpoint(secure=True, host=f"s3.{region}.{domain}", port=443, path="")


def _pieces(answer: Answer, length_bytes: int) -> Iterator[bytearray]:
    """The body in pieces, so that memory is taken as bytes come and not as a server announces them."""
    for start in range(0, length_bytes, _PIECE_BYTES):
        piece = bytearray(min(_PIECE_BYTES, length_bytes - start))
        answer.read_into(memoryview(piece))
        yield piece


def _unix_seconds(date: str) -> float | None:
    """The moment of an HTTP date, None if it is none."""
    found = _DATE.fullmatch(date)
    if found is None or found[2] not in _MONTHS:
        return None
    from datetime import UTC, datetime

    day, year, hour, minute, second = map(int, found.group(1, 3, 4, 5, 6))
    try:
        return datetime(year, _MONTHS.index(found[2]) + 1, day, hour, minute, second, tzinfo=UTC).timestamp()
    except ValueError:
        return None
