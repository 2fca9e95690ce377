"""Signatures: those of botocore, byte for byte, for every key, region, token and moment."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.compat import HTTPHeaders
from botocore.credentials import Credentials
from botocore.utils import percent_encode
from hypothesis import given
from hypothesis import strategies as st

from coldstart.stores.sigv4 import Signer, encode_path

if TYPE_CHECKING:
    import pytest

SEGMENT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/"), min_size=1, max_size=20).filter(
    lambda text: text not in (".", "..")
)
PATHS = st.lists(SEGMENT, min_size=1, max_size=4).map("/".join)
PRINTABLE = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=60)
HOSTS = st.sampled_from(["s3.eu-west-1.amazonaws.com", "127.0.0.1:5000", "[::1]:9000", "a.r2.cloudflarestorage.com"])
MOMENTS = st.integers(min_value=0, max_value=253_402_300_799)


def botocore_headers(signer: Signer, method: str, url: str, region: str, moment: int) -> dict[str, str]:
    """What botocore adds to a request of S3 without a body, for the credentials of ``signer``."""
    request = AWSRequest(method=method, url=url, headers=HTTPHeaders(), data=b"")
    request.context["timestamp"] = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(moment))
    auth = S3SigV4Auth(Credentials(signer._id, signer._secret, signer._token or None), "s3", region)
    auth._modify_request_before_signing(request)
    text = auth.string_to_sign(request, auth.canonical_request(request))
    auth._inject_signature_to_request(request, auth.signature(text, request))
    return {name.lower(): value for name, value in request.headers.items()}


@given(
    method=st.sampled_from(["GET", "HEAD"]),
    path=PATHS,
    host=HOSTS,
    id_=PRINTABLE,
    secret=PRINTABLE,
    token=PRINTABLE | st.just(""),
    region=st.sampled_from(["us-east-1", "eu-central-2", "auto", "cn-north-1", "x"]),
    moment=MOMENTS,
)
def test_the_headers_are_those_of_botocore(
    method: str, path: str, host: str, id_: str, secret: str, token: str, region: str, moment: int
):
    """Authorization, hash, date and token equal botocore's for any key, host, credential, region and second."""
    encoded = encode_path(f"/bucket/{path}")
    signer = Signer(access_key_id=id_, secret_access_key=secret, session_token=token, region=region)
    ours = signer.headers(method, encoded, host, unix_seconds=moment)
    theirs = botocore_headers(signer, method, f"https://{host}{encoded}", region, moment)
    assert ours.pop("host") == host
    assert ours == theirs


@given(path=PATHS)
def test_a_path_is_encoded_as_botocore_does(path: str):
    """Every character outside the unreserved ones is percent-encoded once, in UTF-8, upper case; slashes stay."""
    assert encode_path(path) == percent_encode(path, safe="/~")


def test_the_key_of_a_day_is_not_used_on_the_next():
    """One signer asked on both sides of midnight, in either order, signs like a fresh one."""

    def signer() -> Signer:
        return Signer(access_key_id="id", secret_access_key="secret", session_token="", region="auto")

    used = signer()
    for moment in (86_399, 86_400, 86_399):
        expected = signer().headers("GET", "/b/k", "h", unix_seconds=moment)
        assert used.headers("GET", "/b/k", "h", unix_seconds=moment) == expected


def test_a_signer_shows_no_secret():
    """The repr has neither id nor secret nor token."""
    signer = Signer(access_key_id="planted", secret_access_key="planted", session_token="planted", region="auto")
    assert "planted" not in repr(signer)


def test_the_clock_is_read_as_utc(monkeypatch: pytest.MonkeyPatch):
    """A machine in another time zone signs the same."""
    signer = Signer(access_key_id="id", secret_access_key="secret", session_token="", region="auto")
    here = signer.headers("GET", "/b/k", "h", unix_seconds=1e9)
    monkeypatch.setenv("TZ", "Pacific/Auckland")
    time.tzset()
    try:
        assert signer.headers("GET", "/b/k", "h", unix_seconds=1e9) == here
    finally:
        monkeypatch.undo()
        time.tzset()
