"""A small client of JSON management APIs, and the recorder that stands in for it in a dry run.

The API key travels in the Authorization header and nowhere else: it is masked in everything that is raised or printed,
as are the ``hidden`` values. Redirects are not followed, for they would take the key along. Statuses become errors by
condition (``coldstart.errors``, DeployError); the message holds what the API said (RFC 9457) and what to do.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from urllib.parse import quote, quote_plus, urlsplit

from coldstart.config import read_variable
from coldstart.errors import (
    ConfigError,
    ConflictError,
    CredentialsError,
    DeployError,
    PlatformBusyError,
    RequestInvalidError,
    ResourceMissingError,
)
from coldstart.terms import MASK, VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from email.message import Message

RUNPOD_URL = "https://api.runpod.io"
_RUNPOD_KEYS = "https://console.runpod.io/user/settings"

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_IDEMPOTENT = ("GET", "PUT", "DELETE")
_READING = ("GET",)
_ATTEMPTS = 4
_LONGEST_WAIT_SECONDS = 30.0
_MOST_ANSWER_BYTES = 32 << 20
_SHOWN_CHARACTERS = 1000


class Client(Protocol):
    """What sends requests: a RestClient, or a Recorder."""

    base_url: str

    def request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Send one request and return the JSON of its answer, None where it has none. Raises DeployError."""


class Recorded(NamedTuple):
    """A writing request that a dry run did not send."""

    method: str
    url: str
    body: Mapping[str, Any] | None


class RestClient:
    """Sends JSON requests to one API. ``hidden``: texts besides the key that no message may show.

    Busy answers (429, 5xx) and lost connections are tried again, up to four times in all and as ``Retry-After`` asks,
    where the method is idempotent: GET, PUT and DELETE. ``sleep`` is a seam for tests.

    Raises ConfigError for a base address that is neither https nor loopback, CredentialsError for a key that cannot be
    one.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str,
        *,
        hidden: Iterable[str] = (),
        timeout_seconds: float = 30.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.base_url = _checked_base(base_url)
        if not (api_key.isascii() and api_key.isprintable()) or " " in api_key or not api_key:
            raise CredentialsError("the API key has characters that no key has: copy it again, without spaces")
        self._api_key = api_key
        self._hidden = sorted(
            {form for each in (api_key, *hidden) if each for form in _forms(each)}, key=len, reverse=True
        )
        self._timeout_seconds = timeout_seconds
        self._sleep = sleep
        on_loopback = urlsplit(self.base_url).scheme == "http"
        proxies = [urllib.request.ProxyHandler({})] if on_loopback else []
        self._opener = urllib.request.build_opener(_NoRedirects, *proxies)

    def __repr__(self) -> str:
        """The address alone."""
        return f"RestClient({self.base_url!r})"

    def request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Send one request and return the JSON of its answer, None where it has none. Raises DeployError."""
        attempts = _ATTEMPTS if method in _IDEMPOTENT else 1
        for attempt in range(1, attempts + 1):
            try:
                return self._send(method, path, body)
            except _RetryableError as error:
                wait = error.wait_seconds if error.wait_seconds is not None else 0.5 * 2 ** (attempt - 1)
                if attempt == attempts or wait > _LONGEST_WAIT_SECONDS:
                    raise error.failure from None
                self._sleep(wait)
        raise AssertionError

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        what = f"{method} {self.base_url}{path}"
        try:
            with self._opener.open(self._http_request(method, path, body), timeout=self._timeout_seconds) as answer:
                return self._parsed(what, answer.read(_MOST_ANSWER_BYTES))
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(what, error) from None
        except (OSError, HTTPException) as error:
            reason = self._masked(str(getattr(error, "reason", error)) or type(error).__name__)
            told = f"{what}: no answer ({reason}); check the network{_unsure(method)}"
            raise _RetryableError(PlatformBusyError(told)) from None

    def _http_request(self, method: str, path: str, body: Mapping[str, Any] | None) -> urllib.request.Request:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base_url + path, data, method=method)  # noqa: S310  checked: _checked_base
        request.add_header("Accept", "application/json")
        request.add_header("User-Agent", f"coldstart/{VERSION}")
        if data is not None:
            request.add_header("Content-Type", "application/json")
        request.add_unredirected_header("Authorization", f"Bearer {self._api_key}")
        return request

    def _parsed(self, what: str, data: bytes) -> Any:
        if not data.strip():
            return None
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise DeployError(f"{what}: the answer is not JSON: {self._shown(data)!r}; is the address right?") from None

    def _refusal(self, what: str, error: urllib.error.HTTPError) -> Exception:
        """The error that a status other than 2xx stands for."""
        status = error.code
        kind, advice = _condition(status)
        try:
            said = self._said(error.read(_MOST_ANSWER_BYTES))
        except (OSError, HTTPException):
            said = ""
        failure = kind(
            f"{what}: {status}{f' {said}' if said else ''}{_unsure_status(what, status)}; {advice}", status=status
        )
        return _RetryableError(failure, _retry_after(error.headers)) if kind is PlatformBusyError else failure

    def _said(self, data: bytes) -> str:
        """What an error's body says: title, detail and errors of RFC 9457, else its text."""
        try:
            problem = json.loads(data)
        except (ValueError, RecursionError):
            return self._shown(data)
        if not isinstance(problem, dict):
            return self._shown(data)
        parts = [str(problem[key]) for key in ("title", "detail") if problem.get(key)]
        errors = problem.get("errors")
        listed = "".join(f"\n  - {each}" for each in errors) if isinstance(errors, list) else ""
        text = ": ".join(parts) + listed
        return self._masked(text)[:_SHOWN_CHARACTERS] if text else self._shown(data)

    def _shown(self, data: bytes) -> str:
        return self._masked(" ".join(data.decode("utf-8", "replace").split()))[:_SHOWN_CHARACTERS]

    def _masked(self, text: str) -> str:
        for each in self._hidden:
            text = text.replace(each, MASK)
        return text


class Recorder:
    """A dry run: keeps the writing requests in ``requests`` instead of sending them.

    Reading ones go to ``client``; without one (no key is there) nothing is known of what the platform has, and lists are
    empty. A recorded creation answers with its body and an id that says what it stands for.
    """

    def __init__(self, base_url: str, client: RestClient | None = None) -> None:
        self.base_url = _checked_base(base_url)
        self.requests: list[Recorded] = []
        self.knows = client is not None
        """Whether what the platform has is known."""
        self._client = client

    def request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Read through the client, or keep what would be written."""
        if method in _READING:
            return None if self._client is None else self._client.request(method, path, body)
        self.requests.append(Recorded(method, self.base_url + path, body))
        return {**(body or {}), "id": f"<id of {(body or {}).get('name', path)}>"} if method == "POST" else None


def runpod_client(*, dry_run: bool = False, hidden: Iterable[str] = ()) -> RestClient | Recorder:
    """A client of RunPod's REST v2: RUNPOD_API_KEY at RUNPOD_API_BASE_URL; a Recorder for a dry run.

    Raises CredentialsError where there is no key and this is no dry run.
    """
    base_url = read_variable("RUNPOD_API_BASE_URL") or RUNPOD_URL
    api_key = (read_variable("RUNPOD_API_KEY") or "").strip()
    if not api_key and not dry_run:
        raise CredentialsError(f"RUNPOD_API_KEY is not set: make a key at {_RUNPOD_KEYS} and set it")
    client = RestClient(base_url, api_key, hidden=hidden) if api_key else None
    if dry_run or client is None:
        return Recorder(base_url, client)
    return client


def listed(client: Client, path: str, key: str) -> list[dict[str, Any]]:
    """All resources of a list, its pages followed. Raises DeployError for an answer that is no such list."""
    found: list[dict[str, Any]] = []
    cursors: set[str] = set()
    query = ""
    while True:
        answer = client.request("GET", path + query)
        if answer is None:  # of a recorder that can ask nobody
            return found
        page = answer.get(key) if isinstance(answer, dict) else None
        if not isinstance(page, list) or not all(isinstance(each, dict) for each in page):
            raise DeployError(f"GET {client.base_url}{path}: the answer has no list of {key}")
        found += page
        pagination = answer.get("pagination") or {}
        cursor = str(pagination.get("nextCursor") or "")
        if not pagination.get("hasNextPage") or not cursor or cursor in cursors:
            return found
        cursors.add(cursor)
        query = f"?cursor={quote(cursor, safe='')}"


def segment(text: str) -> str:
    """``text`` as one segment of a path."""
    return quote(text, safe="")


# --- parts -----------------------------------------------------------------------------------------------------------


class _RetryableError(Exception):
    """An attempt failed with ``failure``, which another attempt may not; ``wait_seconds`` is what the API asked for."""

    def __init__(self, failure: DeployError, wait_seconds: float | None = None) -> None:
        super().__init__(str(failure))
        self.failure = failure
        self.wait_seconds = wait_seconds


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """None: a redirect's status is an answer like any other."""


def _forms(text: str) -> set[str]:
    """How an answer may repeat ``text``: as it is, as JSON, as Python shows it, in an address, or with its lines joined."""
    as_json = (json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1])
    in_address = (
        quote(text, errors="replace"),
        quote(text, safe="", errors="replace"),
        quote_plus(text, errors="replace"),
    )
    forms = {text, *as_json, repr(text)[1:-1], *in_address}
    return {form for each in forms for form in (each, " ".join(each.split())) if form}


def _checked_base(base_url: str) -> str:
    try:
        parts = urlsplit(base_url)
    except ValueError as error:
        raise ConfigError(f"the API's address has to be https://host ({error})") from None
    is_loopback = parts.scheme == "http" and parts.hostname in _LOOPBACK
    if not (parts.scheme == "https" or is_loopback) or not parts.hostname or parts.query or "@" in parts.netloc:
        raise ConfigError(f"the API's address has to be https://host, not {base_url.partition('@')[2] or base_url!r}")
    return base_url.rstrip("/")


_CONDITIONS: Mapping[int, tuple[type[DeployError], str]] = {
    400: (RequestInvalidError, "change what the message names"),
    401: (CredentialsError, "the key is wrong, expired or revoked: make a new one and set it"),
    402: (DeployError, "add credit to the account"),
    403: (CredentialsError, "the key lacks the permission: give it write access, or use one that has it"),
    404: (ResourceMissingError, "it may have been deleted: list what is there"),
    409: (ConflictError, "it exists already or is being changed: look at it, then try again"),
    422: (RequestInvalidError, "change what the message names"),
    429: (PlatformBusyError, "too many requests: try again in a minute"),
}


def _condition(status: int) -> tuple[type[DeployError], str]:
    if status in _CONDITIONS:
        return _CONDITIONS[status]
    if status >= 500:  # noqa: PLR2004
        return PlatformBusyError, "the platform failed: try again, and look at its status page"
    return DeployError, "redirects are not followed: check the address" if status < 400 else "see the API's reference"  # noqa: PLR2004


def _unsure(method: str) -> str:
    return "" if method in _READING else "; it may have been done all the same: look before you repeat it"


def _unsure_status(what: str, status: int) -> str:
    return _unsure(what.partition(" ")[0]) if status >= 500 else ""  # noqa: PLR2004


def _retry_after(headers: Message) -> float | None:
    """The seconds that a Retry-After header asks for, as a number or a date; None where it asks for nothing."""
    text = (headers.get("Retry-After") or "").strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
