"""A store in an S3-compatible bucket: AWS S3, Cloudflare R2 and servers that speak the same protocol. Uses boto3.

What is done against habits of the client library and of servers:

- one attempt a call: botocore's own retries differ by version and repeat conditional writes blindly;
- a range's answer is believed only with status 206, the asked Content-Range and the asked number of bytes;
- every write carries Content-MD5, the checksum that most servers check. botocore's own trailing checksums are not
  understood everywhere, and batch deletions need them, so deletions are single;
- no write asks for "100 Continue", which R2 does not send: botocore would wait a second for it;
- no redirect is followed: botocore would sign the request anew for whatever region the answer names, ask for the
  bucket's region again and again where it names none, and send a conditional write twice;
- a refusal that makes no sense, soon after the server has throttled, may pass: the body of a write that was refused early
  can be taken for the next request on its connection. So connections are given up then;
- the instance metadata service is never asked for credentials: outside EC2 that stalls a start for seconds. The
  environment, profiles, SSO, web identity and container credentials work as usual;
- addresses are path-style, and the endpoint comes from ``location``, never from AWS_ENDPOINT_URL.

No error text, repr or address of this module holds a credential.
"""

from __future__ import annotations

import re
import time
from contextlib import closing, contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from coldstart.errors import BlobCorruptError, ObjectMissingError, StoreError, StoreSetupError, StoreTransientError
from coldstart.stores.base import Capabilities, ObjectInfo, Store, StoredObject, check_key, check_size
from coldstart.stores.s3_errors import failure, refusal, unreachable, unusable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from datetime import datetime

    from botocore.exceptions import ClientError

    from coldstart.stores import StoreOptions
    from coldstart.stores.location import BucketLocation

CONNECT_TIMEOUT_SECONDS = 5
READ_TIMEOUT_SECONDS = 20
"""The longest silence of a server within one call, not the length of the call."""
CONNECTIONS = 32
THROTTLED = (429, 503)
"""The statuses by which R2 and S3 ask for fewer requests."""
ODD_SECONDS = 10.0
"""How long after a throttle a refusal that makes no sense is put down to it."""

_PIECE_BYTES = 1 << 20


class S3Store(Store):
    """Objects of one bucket below one prefix.

    ``capabilities`` says what the server is known to enforce; a condition that it does not enforce is not sent. An
    object is written by one PUT. Raises StoreSetupError where boto3 is missing or the options contradict each other.
    """

    def __init__(
        self,
        location: BucketLocation,
        options: StoreOptions,
        *,
        capabilities: Capabilities = Capabilities(create_if_absent=True, compare_and_swap=True, ranges=True),  # noqa: B008
    ) -> None:
        self._location = location
        self._capabilities = capabilities
        self._client = _client(location, options)
        self._throttled_monotonic_seconds = float("-inf")

    @property
    def url(self) -> str:
        """Scheme, bucket and prefix; neither endpoint nor credentials."""
        return f"{self._location.scheme}://{self._location.bucket}/{self._location.prefix}".rstrip("/")

    @property
    def capabilities(self) -> Capabilities:
        """What the constructor was given."""
        return self._capabilities

    def __repr__(self) -> str:
        return f"S3Store({self.url!r})"

    def get(self, key: str) -> StoredObject:
        """One GET; the etag is the server's, as it sent it."""
        with self._mapped(key):
            answer = self._client.get_object(**self._object(key))
            with closing(answer["Body"]) as body:
                check_size(key, answer.get("ContentLength") or 0)
                data: bytes = body.read()
        if len(data) != answer.get("ContentLength"):
            raise StoreTransientError(
                f"{self.url} sent {len(data)} bytes of {key!r}, not the length it announced", key=key
            )
        return StoredObject(data, self._etag(answer, key))

    def read_into(self, key: str, target: memoryview, *, offset_bytes: int = 0) -> None:
        """One ranged GET, put into ``target`` piece by piece as it comes."""
        if not len(target):
            self.head(key)  # an empty range cannot be asked for
            return
        end = offset_bytes + len(target) - 1
        with self._mapped(key):
            answer = self._client.get_object(**self._object(key), Range=f"bytes={offset_bytes}-{end}")
            with closing(answer["Body"]) as body:
                self._check_range(answer, key, offset_bytes, end)
                self._fill(target, body, key)

    def head(self, key: str) -> ObjectInfo:
        """One HEAD; the age is by the server's clock."""
        with self._mapped(key):
            answer = self._client.head_object(**self._object(key))
        return self._info(key, answer.get("ContentLength"), answer.get("LastModified"))

    def put(self, key: str, data: bytes | memoryview, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """One PUT."""
        body = bytes(data)  # boto3 takes no memoryview
        conditions = self._conditions(if_absent=if_absent, if_match=if_match)
        with self._mapped(key, conditional=bool(conditions)):
            answer = self._client.put_object(**self._object(key), Body=body, ContentMD5=_md5(body), **conditions)
        return self._etag(answer, key)

    def delete(self, key: str) -> None:
        """One DELETE."""
        try:
            with self._mapped(key):
                self._client.delete_object(**self._object(key))
        except ObjectMissingError:
            return

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """A page of up to 1000 objects a request. What is no key of ours is left out."""
        if prefix:
            check_key(prefix.removesuffix("/"))
        return self._pages(prefix)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _pages(self, prefix: str) -> Iterator[ObjectInfo]:
        asked: dict[str, str] = {"Bucket": self._location.bucket, "Prefix": self._full(prefix)}
        while True:
            with self._mapped(prefix):
                page = self._client.list_objects_v2(**asked)
            following = page.get("NextContinuationToken")
            # A proxy's page parses as an empty listing, which a collector would believe.
            if "IsTruncated" not in page or (page["IsTruncated"] and not following):
                raise StoreTransientError(
                    f"{self.url} answered a listing of {prefix!r} with something else", key=prefix
                )
            for found in page.get("Contents", ()):
                key = found.get("Key", "")[len(self._full("")) :]
                if _is_key(key):  # others may share the bucket
                    yield self._info(key, found.get("Size"), found.get("LastModified"))
            if not page["IsTruncated"]:
                return
            asked["ContinuationToken"] = following

    def _full(self, key: str) -> str:
        return f"{self._location.prefix}/{key}" if self._location.prefix else key

    def _object(self, key: str) -> dict[str, str]:
        return {"Bucket": self._location.bucket, "Key": self._full(check_key(key))}

    def _conditions(self, *, if_absent: bool, if_match: str | None) -> dict[str, str]:
        if if_absent and self._capabilities.create_if_absent:
            return {"IfNoneMatch": "*"}
        if if_match is not None and self._capabilities.compare_and_swap:
            return {"IfMatch": if_match}
        return {}

    def _info(self, key: str, size_bytes: int | None, modified: datetime | None) -> ObjectInfo:
        if size_bytes is None or modified is None:
            raise StoreTransientError(f"{self.url} gave neither size nor age of {key!r}", key=key)
        # Whole seconds, as a HEAD has them: R2 lists milliseconds.
        return ObjectInfo(key, size_bytes, float(int(modified.timestamp())))

    def _etag(self, answer: Mapping[str, Any], key: str) -> str:
        etag: str = answer.get("ETag", "")
        if not etag:
            raise StoreTransientError(f"{self.url} answered without an ETag for {key!r}", key=key)
        return etag

    def _check_range(self, answer: Mapping[str, Any], key: str, start: int, end: int) -> None:
        status = answer["ResponseMetadata"]["HTTPStatusCode"]
        parts = re.match(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)\Z", answer.get("ContentRange", ""))
        if parts and parts[3] != "*" and int(parts[3]) <= end:
            raise BlobCorruptError(
                f"{key!r} in {self.url} has {parts[3]} bytes, bytes {start}-{end} were asked for", key=key
            )
        exact = (
            parts and (int(parts[1]), int(parts[2])) == (start, end) and answer.get("ContentLength") == end - start + 1
        )
        if status != 206 or not exact:  # noqa: PLR2004
            raise StoreTransientError(
                f"{self.url} was asked for bytes {start}-{end} of {key!r} and answered {status} with others; "
                "a proxy or cache in between may do that",
                key=key,
            )

    def _fill(self, target: memoryview, body: Any, key: str) -> None:
        done = 0
        while done < len(target):
            piece = body.read(min(_PIECE_BYTES, len(target) - done))
            if not piece:
                raise StoreTransientError(f"{self.url} ended {key!r} after {done} of {len(target)} bytes", key=key)
            target[done : done + len(piece)] = piece
            done += len(piece)

    @contextmanager
    def _mapped(self, key: str, *, conditional: bool = False) -> Iterator[None]:
        """Turn what boto3 raises, and what is below it, into our errors. ``conditional``: the call is such a write."""
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError
        from urllib3.exceptions import HTTPError

        try:
            yield
        except ClientError as error:
            raise self._refusal(error, key, conditional=conditional) from error
        except BotoCoreError as error:
            raise failure(error, self.url, key) from None
        except (ResponseParserError, HTTPError, ValueError) as error:  # ValueError: a header that is no number or date
            raise unreachable(error, self.url, key) from None

    def _refusal(self, error: ClientError, key: str, *, conditional: bool) -> StoreError | BlobCorruptError:
        refused = refusal(error, self.url, key, conditional=conditional)
        now = time.monotonic()
        if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") in THROTTLED:
            self._throttled_monotonic_seconds = now
            self._client.close()  # its connections; the next request makes others
        elif type(refused) is StoreError and now - self._throttled_monotonic_seconds < ODD_SECONDS:
            self._client.close()
            return StoreTransientError(f"{refused}, soon after it had throttled: it may work when asked again", key=key)
        return refused


def _client(location: BucketLocation, options: StoreOptions) -> Any:
    if bool(options.access_key_id) != bool(options.secret_access_key) or (
        options.session_token and not options.access_key_id
    ):
        raise StoreSetupError("the access key id and the secret access key are given together or not at all")
    try:
        boto3_session: Any = import_module("boto3.session")
        core_session: Any = import_module("botocore.session")
        config: Any = import_module("botocore.config")
    except ImportError as error:
        raise StoreSetupError('s3:// and r2:// stores need boto3: pip install "coldstart-gpu[s3]"') from error
    from botocore.exceptions import BotoCoreError

    try:
        core = core_session.Session()
        core.get_component("credential_provider").remove("iam-role")
        session = boto3_session.Session(botocore_session=core)
        client = session.client(
            "s3",
            endpoint_url=location.endpoint_url or None,
            region_name=location.region or session.region_name or "us-east-1",
            aws_access_key_id=options.access_key_id or None,
            aws_secret_access_key=options.secret_access_key or None,
            aws_session_token=options.session_token or None,
            config=config.Config(
                signature_version="s3v4",
                s3={"addressing_style": "path"},
                ignore_configured_endpoint_urls=True,
                defaults_mode="legacy",  # "auto" asks the metadata service for a region
                retries={"mode": "standard", "total_max_attempts": 1},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                connect_timeout=CONNECT_TIMEOUT_SECONDS,
                read_timeout=READ_TIMEOUT_SECONDS,
                max_pool_connections=CONNECTIONS,
            ),
        )
    except (BotoCoreError, ValueError) as error:
        raise unusable(error, f"{location.scheme}://{location.bucket}") from None
    client.meta.events.register_last("before-call.s3", _ask_plainly)
    return client


def _ask_plainly(params: dict[str, Any], **_: Any) -> None:
    """Without "100 Continue"; and as if a redirect had been followed already, of which botocore follows one."""
    params["headers"].pop("Expect", None)
    params.setdefault("context", {}).setdefault("s3_redirect", {})["redirected"] = True


def _md5(data: bytes) -> str:
    from base64 import b64encode
    from hashlib import md5

    return b64encode(md5(data, usedforsecurity=False).digest()).decode()


def _is_key(key: str) -> bool:
    try:
        check_key(key)
    except StoreSetupError:
        return False
    return True
