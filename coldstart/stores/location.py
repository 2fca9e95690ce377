"""Where a bucket is: its address and endpoint, taken apart and checked without a request and without boto3."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from coldstart.errors import StoreSetupError
from coldstart.stores.base import check_key

if TYPE_CHECKING:
    from ipaddress import IPv4Address, IPv6Address

    from coldstart.stores import StoreOptions

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}\Z")
_ACCOUNT = re.compile(r"[A-Za-z0-9]{1,64}\Z")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?\Z")
_METADATA_HOSTS = frozenset({"metadata", "metadata.google.internal", "instance-data", "instance-data.ec2.internal"})
_METADATA_ADDRESSES = frozenset({"fd00:ec2::254", "100.100.100.200", "168.63.129.16"})


class BucketLocation(NamedTuple):
    """Where a bucket is, and what part of it belongs to the store.

    ``endpoint_url`` "" is AWS itself; ``region`` "" is the one that the AWS settings of this machine name.
    """

    scheme: str
    bucket: str
    prefix: str
    endpoint_url: str
    region: str


def locate(url: str, options: StoreOptions) -> BucketLocation:
    """Take apart ``s3://bucket/prefix`` or ``r2://bucket/prefix``. Makes no request. Raises StoreSetupError."""
    scheme, _, rest = url.partition("://")
    bucket, _, prefix = rest.partition("/")
    if not _BUCKET.match(bucket) or ".." in bucket:
        # Not repeated: whoever writes s3://KEY:SECRET@bucket has put a secret here.
        raise StoreSetupError(
            f"a {scheme} address is {scheme}://bucket/prefix; credentials, ports and options do not belong in it, and a"
            " bucket's name has 3 to 63 lower-case letters, digits, dots and hyphens"
        )
    prefix = prefix.strip("/")
    if prefix:
        check_key(prefix)
    endpoint_url = check_endpoint(options.endpoint_url) if options.endpoint_url else ""
    region = options.region
    if scheme == "r2":
        endpoint_url = endpoint_url or _r2_endpoint(options.r2_account_id)
        region = region or "auto"
    return BucketLocation(scheme, bucket, prefix, endpoint_url, region)


def _r2_endpoint(account_id: str) -> str:
    if not _ACCOUNT.match(account_id):
        raise StoreSetupError(
            "an r2:// store needs the Cloudflare account id (or the whole endpoint, for buckets with a jurisdiction): "
            "set COLDSTART_R2_ACCOUNT_ID or COLDSTART_ENDPOINT_URL"
        )
    return f"https://{account_id}.r2.cloudflarestorage.com"


def check_endpoint(url: str) -> str:
    """Return ``url`` without a trailing slash if it may be talked to, else raise StoreSetupError.

    https, or http to this machine itself; no user, password, query or fragment; not a link-local or metadata address,
    however it is written. Names are not resolved.
    """
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise _bad_endpoint("it is not a URL") from error
    if any(character <= " " or character in '\\"<>\x7f' for character in url):
        raise _bad_endpoint("it has spaces or control characters")
    if "@" in parts.netloc or "?" in url or "#" in url:
        raise _bad_endpoint(
            "it has a user, a password, a query or a fragment: give credentials as settings of their own"
        )
    loopback = _check_host(host)
    if port == 0 or (parts.scheme != "https" and not (parts.scheme == "http" and loopback)):
        raise _bad_endpoint("it must begin with https:// (http:// is for this machine itself: localhost, 127.0.0.1)")
    return url.rstrip("/")


def _check_host(host: str) -> bool:
    """Whether ``host`` is this machine; raises StoreSetupError for one that is never a bucket's."""
    import ipaddress
    import socket

    try:
        if ":" in host:
            address: IPv4Address | IPv6Address = ipaddress.IPv6Address(host)
            address = getattr(address, "ipv4_mapped", None) or address
        else:  # as the resolver reads it: 169.254.43518, 0xA9FEA9FE and 2852039166 are addresses too
            address = ipaddress.IPv4Address(socket.inet_aton(host))
    except (OSError, ValueError) as error:
        if not _HOST.match(host):
            raise _bad_endpoint("it has no proper host name") from error
        if host.rstrip(".") in _METADATA_HOSTS:
            raise _bad_endpoint("it is a metadata service") from error
        return host == "localhost"
    if address.is_link_local or address.is_multicast or address.is_unspecified or str(address) in _METADATA_ADDRESSES:
        raise _bad_endpoint("it is a link-local or metadata address")
    return address.is_loopback


def _bad_endpoint(reason: str) -> StoreSetupError:
    return StoreSetupError(f"the endpoint URL of the store cannot be used: {reason}")
