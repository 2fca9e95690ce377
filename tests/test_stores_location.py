"""Buckets' addresses and endpoints: what is taken apart how, and what may never be talked to."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldstart.errors import StoreSetupError
from coldstart.stores import StoreOptions
from coldstart.stores.location import BucketLocation, check_endpoint, locate


def test_an_s3_address_is_bucket_and_prefix():
    """Without options it is AWS, in whatever region the machine's settings name."""
    assert locate("s3://bucket/a/b/", StoreOptions()) == BucketLocation("s3", "bucket", "a/b", "", "")
    assert locate("s3://bucket", StoreOptions(region="eu-west-1")).region == "eu-west-1"


def test_an_r2_address_gets_endpoint_and_region_from_the_account():
    """R2 is S3 at the account's endpoint in the region auto."""
    location = locate("r2://bucket/p", StoreOptions(r2_account_id="0a1b"))
    assert location == BucketLocation("r2", "bucket", "p", "https://0a1b.r2.cloudflarestorage.com", "auto")


def test_an_explicit_endpoint_wins_over_the_account():
    """Buckets with a jurisdiction have an endpoint of their own."""
    options = StoreOptions(endpoint_url="https://0a1b.eu.r2.cloudflarestorage.com/", r2_account_id="0a1b")
    assert locate("r2://bucket", options).endpoint_url == "https://0a1b.eu.r2.cloudflarestorage.com"


@pytest.mark.parametrize("account", ["", "evil.com/", "a.b", "a@b", "a b", "a\n"])
def test_an_account_id_that_could_change_the_host_is_refused(account: str):
    """Only letters and digits become part of R2's host name; the error says what to set."""
    with pytest.raises(StoreSetupError, match="COLDSTART_R2_ACCOUNT_ID"):
        locate("r2://bucket", StoreOptions(r2_account_id=account))


@pytest.mark.parametrize(
    "rest",
    [
        "", "/prefix", "..", "a..b", "x", "id:planted@bucket/p", "bucket:9000/p", "bucket?planted", "bucket#planted",
        "a b/p", "bucket\n/p", "-bucket", "b\0ket",
    ],
)  # fmt: skip
def test_a_bad_bucket_is_refused_and_not_repeated(rest: str):
    """What is no bucket name may hold credentials, so the error does not show it."""
    with pytest.raises(StoreSetupError) as caught:
        locate(f"s3://{rest}", StoreOptions())
    assert "planted" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["../up", "a/../b", "a//b", "a b", "a?b", ".hidden"])
def test_a_bad_prefix_is_refused(prefix: str):
    """A prefix is made of the same parts as a key."""
    with pytest.raises(StoreSetupError):
        locate(f"s3://bucket/{prefix}", StoreOptions())


@pytest.mark.parametrize(
    "url",
    [
        "https://s3.example.org", "https://s3.example.org:9000/some/path", "https://minio", "http://localhost:9000",
        "http://127.0.0.1:1", "http://127.8.8.8", "http://[::1]:9000", "https://10.0.0.8", "https://[2001:db8::1]",
    ],
)  # fmt: skip
def test_a_sound_endpoint_is_kept(url: str):
    """An endpoint is https to anywhere that is a place, http to this machine."""
    assert check_endpoint(url) == url
    assert check_endpoint(f"{url}/") == url


@pytest.mark.parametrize(
    "url",
    [
        "", "s3.example.org", "http://s3.example.org", "http://10.0.0.8", "ftp://localhost", "gopher://localhost",
        "https://", "https:///path", "https://id:planted@host", "https://planted@host", "https://@host",
        "https://host?planted", "https://host#planted", "https://host/?", "https://ho st", "https://host\\@evil",
        "https://host\n", "https://host:0", "https://host:99999", "https://host:planted", "https://[::1", "https://-h",
        "http://169.254.169.254", "https://169.254.169.254", "https://169.254.0.1", "https://169.254.43518",
        "https://2852039166", "https://0xA9FEA9FE", "https://0251.0376.0251.0376", "https://[fe80::1]",
        "https://[::ffff:169.254.169.254]", "https://[fd00:ec2::254]", "https://100.100.100.200", "https://0.0.0.0",
        "https://[::]", "https://224.0.0.1", "https://metadata.google.internal", "https://METADATA.google.internal.",
        "https://metadata", "http://localhost.evil.org", "http://127.0.0.1.evil.org",
    ],
)  # fmt: skip
def test_a_dangerous_endpoint_is_refused_and_not_repeated(url: str):
    """Plain http elsewhere, credentials or options in the URL, metadata and link-local addresses however written."""
    with pytest.raises(StoreSetupError) as caught:
        check_endpoint(url)
    assert "planted" not in str(caught.value)


@given(st.text() | st.from_regex(r"https?://[^/]{0,30}(/.*)?", fullmatch=True))
def test_any_text_is_an_endpoint_or_a_setup_error(url: str):
    """Whatever is given, what passes is https or this machine, without a user; all else is StoreSetupError."""
    try:
        parts = urlsplit(check_endpoint(url))
    except StoreSetupError:
        return
    assert parts.username is None
    assert parts.scheme == "https" or parts.hostname in ("localhost", "::1") or str(parts.hostname).startswith("127.")
