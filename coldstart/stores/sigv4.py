"""AWS signature version 4 for requests without a body or a query, in headers: all that reading an object needs.

Signed are the method, the path, the host, the time and the session token. Other headers (a range, say) may be added
freely. The hash of the empty body is signed rather than UNSIGNED-PAYLOAD, which some servers take over https alone.
"""

from __future__ import annotations

import hmac
import re
import time
from hashlib import sha256

EMPTY_SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

_ENCODED = re.compile(rb"[^A-Za-z0-9._~/-]")


def encode_path(path: str) -> str:
    """``path`` as S3 signs it and as it is sent: each byte of its UTF-8 that is not unreserved or "/" as %XX, once."""
    return _ENCODED.sub(lambda found: b"%%%02X" % found[0][0], path.encode()).decode()


class Signer:
    """Signs for one pair of credentials and one region. Shared by threads; shows no credential."""

    def __init__(self, *, access_key_id: str, secret_access_key: str, session_token: str, region: str) -> None:
        self._id = access_key_id
        self._secret = secret_access_key
        self._token = session_token
        self._region = region
        self._key = ("", b"")

    def headers(self, method: str, path: str, host: str, *, unix_seconds: float) -> dict[str, str]:
        """Every signed header and Authorization. ``path`` as ``encode_path`` gives it, ``host`` as the header has it."""
        moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(unix_seconds))
        signed = {"host": host, "x-amz-content-sha256": EMPTY_SHA256, "x-amz-date": moment}
        if self._token:
            signed["x-amz-security-token"] = self._token
        lines = "".join(f"{name}:{value}\n" for name, value in signed.items())  # in alphabetical order
        names = ";".join(signed)
        request = f"{method}\n{path}\n\n{lines}\n{names}\n{EMPTY_SHA256}"
        scope = f"{moment[:8]}/{self._region}/s3/aws4_request"
        text = f"AWS4-HMAC-SHA256\n{moment}\n{scope}\n{sha256(request.encode()).hexdigest()}"
        signature = _hmac(self._key_of(moment[:8]), text).hex()
        return {
            **signed,
            "authorization": f"AWS4-HMAC-SHA256 Credential={self._id}/{scope}, SignedHeaders={names}, "
            f"Signature={signature}",
        }

    def _key_of(self, day: str) -> bytes:
        """The signing key of a day, kept until the next."""
        known_day, key = self._key
        if known_day != day:
            key = _hmac(f"AWS4{self._secret}".encode(), day)
            for part in (self._region, "s3", "aws4_request"):
                key = _hmac(key, part)
            self._key = (day, key)
        return key


def _hmac(key: bytes, text: str) -> bytes:
    return hmac.digest(key, text.encode(), "sha256")
