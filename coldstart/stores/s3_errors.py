"""What the errors of boto3, and the answers that it takes for errors, mean in the terms of the store contract.

Texts are made of our words, the store's address, the key, the status and the error's code. What a server says beyond
that may repeat the request and its credentials, so it is not shown.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from coldstart.errors import (
    AccessDeniedError,
    BlobCorruptError,
    ConditionFailedError,
    ObjectMissingError,
    StoreError,
    StoreSetupError,
    StoreTransientError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from botocore.exceptions import BotoCoreError, ClientError

_ABOUT_CREDENTIALS = re.compile("Credential|Token|SSO|Login|MFA")
"""In the names of botocore's errors; the classes differ by version."""

_ADVICE_ON_ACCESS = (
    "check the credentials and what they may do. S3 answers so for a missing object too where they may not list the "
    "bucket, and R2 for up to a minute after a token was made"
)
_REFUSED = (AccessDeniedError, _ADVICE_ON_ACCESS)
_NO_BUCKET = (StoreSetupError, "the bucket does not exist at this endpoint: create it, or correct its name")
_OTHER_REGION = (StoreSetupError, "the bucket lives in another region: set the store's region")
_NO_CONDITIONS = (StoreSetupError, "the server does not implement this request: use a store that does")
_MAY_PASS = (StoreTransientError, "the server is overloaded, or failed; it may work when asked again")
_MISSING = (ObjectMissingError, "nothing is stored there")
_LOST = (ConditionFailedError, "it exists already, or has changed since it was read")
_UNEXPECTED = (StoreError, "the server refused the request")

_BY_CODE: Mapping[str, tuple[type[StoreError], str]] = {
    "NoSuchBucket": _NO_BUCKET,
    "InvalidBucketName": _NO_BUCKET,
    "PermanentRedirect": _OTHER_REGION,
    "AuthorizationHeaderMalformed": _OTHER_REGION,
    "IllegalLocationConstraintException": _OTHER_REGION,
    "ExpiredToken": _REFUSED,
    "InvalidToken": _REFUSED,
    "RequestTimeTooSkewed": (AccessDeniedError, "the clock of this machine is wrong: set it"),
    "RequestTimeout": _MAY_PASS,
    "RequestTimeTooSlow": _MAY_PASS,
    "ClientDisconnect": _MAY_PASS,
    "IncompleteBody": _MAY_PASS,
    "BadDigest": _MAY_PASS,  # the bytes changed on their way
    "NotImplemented": _NO_CONDITIONS,
}
_BY_STATUS: Mapping[int, tuple[type[StoreError], str]] = {
    301: _OTHER_REGION,
    307: _OTHER_REGION,
    308: _OTHER_REGION,
    401: _REFUSED,
    403: _REFUSED,
    404: _MISSING,
    408: _MAY_PASS,
    409: _MAY_PASS,
    425: _MAY_PASS,
    429: _MAY_PASS,
    499: _MAY_PASS,
    501: _NO_CONDITIONS,
}


def refusal(error: ClientError, url: str, key: str, *, conditional: bool) -> StoreError | BlobCorruptError:
    """What an answer with an error status means. Of its body only the code is shown: the rest may echo the request."""
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    code = str(error.response.get("Error", {}).get("Code", ""))
    shown = code if code.isascii() and code.isalnum() and len(code) <= 64 else "no code"  # noqa: PLR2004
    if status == 416:  # noqa: PLR2004
        return BlobCorruptError(f"{key!r} in {url} is shorter than what was asked of it", key=key)
    kind, advice = _meaning(status, code, conditional=conditional)
    return kind(f"{url} answered {status} ({shown}) for {key!r}: {advice}", key=key)


def _meaning(status: int, code: str, *, conditional: bool) -> tuple[type[StoreError], str]:
    if code in _BY_CODE:
        return _BY_CODE[code]
    if conditional and status in (404, 409, 412):  # 409: AWS, for a race; 404: the object of an If-Match is gone
        return _LOST
    return _BY_STATUS.get(status, _MAY_PASS if status >= 500 else _UNEXPECTED)  # noqa: PLR2004


def failure(error: BotoCoreError, url: str, key: str) -> StoreError:
    """What an error of the client itself means, which no server sent."""
    from botocore import exceptions as known

    if isinstance(error, known.SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
        return StoreSetupError(f"this machine does not trust the certificate of {url}, asked for {key!r}", key=key)
    if isinstance(error, (known.HTTPClientError, known.ConnectionError, known.IncompleteReadError)):
        return unreachable(error, url, key)
    return unusable(error, url)


def unusable(error: Exception, url: str) -> StoreError:
    """What is wrong with the credentials or the AWS settings of this machine."""
    name = type(error).__name__
    if _ABOUT_CREDENTIALS.search(name):  # without the error's own text: it may be what a credential helper printed
        return AccessDeniedError(f"no usable credentials for {url} ({name}): give them as settings or to the AWS chain")
    return StoreSetupError(f"boto3 cannot use {url}: {name}: {error}")


def unreachable(error: Exception, url: str, key: str) -> StoreTransientError:
    """No answer, half of one, or one that is none."""
    return StoreTransientError(
        f"{url} could not be reached, or broke off, at {key!r} ({type(error).__name__}); it may work when asked again",
        key=key,
    )
