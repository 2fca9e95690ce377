"""Snapshot stores: one address opens one store, and only the code of that store is imported.

``open_store`` is the one place that knows every kind of store. A store reached over a network comes wrapped in
``retrying.RetryingStore`` and, if asked for, in ``cached.CachedStore``; a local one answers or fails at once and needs
no wrapper.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from coldstart.errors import StoreSetupError

if TYPE_CHECKING:
    from collections.abc import Callable

    from coldstart.stores.base import Store
    from coldstart.stores.location import BucketLocation

SCHEMES = ("file", "s3", "r2", "memory")
"""What may stand before ``://`` in a store's address; a plain path is ``file``."""

_MASK = "***"


class StoreOptions(NamedTuple):
    """What an address leaves open. "" is unset: the store's own default, for credentials the usual AWS chain.

    ``endpoint_url``: an S3-compatible server instead of AWS. ``r2_account_id`` gives the endpoint of ``r2://``
    addresses. The two keys come together or not at all. The repr masks them; a pickle holds them. ``cache``: a folder for
    copies of what remote stores hold, at most ``cache_bytes`` of them; see ``stores.cached``. A folder's flat files of
    segments have the same limit; see ``segments``.
    """

    endpoint_url: str = ""
    region: str = ""
    access_key_id: str = ""
    secret_access_key: str = ""
    session_token: str = ""
    r2_account_id: str = ""
    cache: str = ""
    cache_bytes: int = 50 << 30

    def __repr__(self) -> str:
        shown = self._replace(
            access_key_id=self.access_key_id and _MASK,
            secret_access_key=self.secret_access_key and _MASK,
            session_token=self.session_token and _MASK,
        )
        pairs = ", ".join(f"{name}={value!r}" for name, value in zip(self._fields, shown, strict=True))
        return f"StoreOptions({pairs})"


def open_store(
    url: str,
    options: StoreOptions = StoreOptions(),  # noqa: B008  a frozen value
    *,
    degraded: Callable[[str], None] | None = None,
) -> Store:
    """Open the store at ``url``. No request is made and no folder created before the first operation.

    ``memory://NAME`` (shared by name within the process), ``file:///folder`` or a plain path, ``s3://bucket/prefix``,
    ``r2://bucket/prefix``. ``degraded`` is told, in any thread, what of the local cache had to be given up.
    Raises StoreSetupError for an address or options that cannot be used.

    A bucket is read without boto3, and not through a proxy, where the options have what that needs: both keys, and a
    region or an endpoint. Otherwise boto3 finds them, at once: profiles, SSO, the credentials of a container.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme == "file":
        return _open_folder(folder_of(url), options)
    if scheme == "memory":
        from coldstart.stores.memory import MemoryStore

        return MemoryStore.shared(rest)
    if scheme in ("s3", "r2"):
        return _cached(_open_remote(url, options), options, degraded)
    # The address is not repeated: what follows an unknown scheme may hold a password.
    raise StoreSetupError(
        f"unknown store scheme {scheme!r}: use {', '.join(f'{known}://' for known in SCHEMES)} or the path of a folder"
    )


def folder_of(url: str) -> str:
    """The path of the folder that an address names, "" where it names none. Raises StoreSetupError, as ``open_store``."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    return _path_of(rest) if scheme == "file" else ""


def _path_of(rest: str) -> str:
    host, slash, path = rest.partition("/")
    if host not in ("", "localhost") or not slash:
        raise StoreSetupError(f"file://{rest} names a host: a folder's address has three slashes, file:///folder")
    if "%" not in path:
        return f"/{path}"
    from urllib.parse import unquote

    return f"/{unquote(path)}"


def _open_folder(path: str, options: StoreOptions) -> Store:
    from coldstart.stores.local import LocalStore

    return LocalStore(path, flat_files_bytes=options.cache_bytes)


def _open_remote(url: str, options: StoreOptions) -> Store:
    from coldstart.stores.location import locate
    from coldstart.stores.retrying import RetryingStore

    return RetryingStore(_open_bucket(locate(url, options), options))


def _open_bucket(location: BucketLocation, options: StoreOptions) -> Store:
    from coldstart.stores.s3_reader import ReadingS3Store, reads_directly

    if reads_directly(location, options):
        return ReadingS3Store(location, options)
    from coldstart.stores.s3 import S3Store

    return S3Store(location, options)


def _cached(store: Store, options: StoreOptions, degraded: Callable[[str], None] | None) -> Store:
    if not options.cache:
        return store
    from coldstart.stores.cached import CachedStore

    return CachedStore(store, options.cache, limit_bytes=options.cache_bytes, degraded=degraded)
