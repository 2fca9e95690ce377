"""Snapshot stores: one address opens one store, and only the code of that store is imported.

``open_store`` is the one place that knows every kind of store. A store reached over a network comes wrapped in
``probing.ProbingStore`` and ``retrying.RetryingStore`` and, if asked for, in ``cached.CachedStore``; a local one answers or
fails at once and needs no wrapper. With replicas, ``replicated.ReplicatedStore`` joins what was opened for each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.errors import StoreSetupError

if TYPE_CHECKING:
    from collections.abc import Callable

    from coldstart.stores.base import Store
    from coldstart.stores.location import BucketLocation
    from coldstart.stores.replicated import Member
    from coldstart.stores.retrying import RetryPolicy

_REMOTE = ("s3://", "r2://")
SCHEMES = ("file", "s3", "r2", "memory")
"""What may stand before ``://`` in a store's address; a plain path is ``file``."""

_MASK = "***"
_KEYS = ("access_key_id", "secret_access_key", "session_token")
_SECRETS = (*_KEYS, *(f"replica_{field}" for field in _KEYS))


class StoreOptions(NamedTuple):
    """What an address leaves open. "" is unset: the store's own default, for credentials the usual AWS chain.

    ``endpoint_url``: an S3-compatible server instead of AWS. ``r2_account_id`` gives the endpoint of ``r2://``
    addresses. The two keys come together or not at all. The repr masks them; a pickle holds them. ``cache``: a folder for
    copies of what remote stores hold, at most ``cache_bytes`` of them; see ``stores.cached``. A folder's flat files of
    segments have the same limit; see ``segments``. ``store_replicas``: addresses with commas between them of stores that hold
    the same, of which ``store_copies`` have to take a write; the fields ``replica_*`` are theirs, "" as the store's own.
    ``recovery``: a mode of ``coldstart.recovery``, which says whether replicas are read, and how patiently.
    """

    endpoint_url: str = ""
    region: str = ""
    access_key_id: str = ""
    secret_access_key: str = ""
    session_token: str = ""
    r2_account_id: str = ""
    cache: str = ""
    cache_bytes: int = 50 << 30
    store_replicas: str = ""
    store_copies: int = 2
    replica_endpoint_url: str = ""
    replica_region: str = ""
    replica_access_key_id: str = ""
    replica_secret_access_key: str = ""
    replica_session_token: str = ""
    recovery: str = "standard"

    def __repr__(self) -> str:
        masked: dict[str, Any] = {field: _MASK for field in _SECRETS if getattr(self, field)}
        shown = self._replace(**masked)
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
    ``r2://bucket/prefix``. ``degraded`` is told, in any thread, what of the local cache had to be given up, what the store
    does not enforce, and which replica was passed over.
    Raises StoreSetupError for an address or options that cannot be used.

    A bucket is read without boto3, and not through a proxy, where the options have what that needs: both keys, and a
    region or an endpoint. Otherwise boto3 finds them, at once: profiles, SSO, the credentials of a container.
    """
    if options.store_replicas:
        store = _open_replicated(url, options, degraded)
        has_remote = any(each.startswith(_REMOTE) for each in (url, *options.store_replicas.split(",")))
        return _cached(store, options, degraded) if has_remote else store
    store = _open_one(url, options, degraded)
    return _cached(store, options, degraded) if url.startswith(_REMOTE) else store


def _open_one(url: str, options: StoreOptions, degraded: Callable[[str], None] | None) -> Store:
    scheme, separator, rest = url.partition("://")
    if not separator or scheme == "file":
        return _open_folder(folder_of(url), options)
    if scheme == "memory":
        from coldstart.stores.memory import MemoryStore

        return MemoryStore.shared(rest)
    if scheme in ("s3", "r2"):
        return _retrying(_open_remote(url, options, degraded))
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


def _open_remote(
    url: str, options: StoreOptions, degraded: Callable[[str], None] | None, *, is_brief: bool = False
) -> Store:
    from coldstart.stores.location import locate
    from coldstart.stores.probing import ProbingStore

    location = locate(url, options)
    identity = f"{location.endpoint_url} {location.region} {location.bucket}"
    return ProbingStore(_open_bucket(location, options, is_brief=is_brief), identity=identity, degraded=degraded)


def _retrying(store: Store, policy: RetryPolicy | None = None) -> Store:
    from coldstart.stores.retrying import RetryingStore, RetryPolicy

    return RetryingStore(store, policy or RetryPolicy())


def _open_bucket(location: BucketLocation, options: StoreOptions, *, is_brief: bool) -> Store:
    from coldstart.stores.http1_answer import BRIEF_LIMITS, Limits
    from coldstart.stores.s3_reader import ReadingS3Store, reads_directly

    if reads_directly(location, options):
        return ReadingS3Store(location, options, limits=BRIEF_LIMITS if is_brief else Limits())
    from coldstart.stores.s3 import S3Store

    return S3Store(location, options)


def _open_replicated(url: str, options: StoreOptions, degraded: Callable[[str], None] | None) -> Store:
    from coldstart.recovery import MODES
    from coldstart.stores.replicated import ReplicatedStore

    mode = MODES[options.recovery]
    replicas = options.store_replicas.split(",")
    members = [_member(url, options, degraded, is_brief=mode.is_brief)]
    members += [_member(each.strip(), _of_replica(options), degraded, is_brief=mode.is_brief) for each in replicas]
    return ReplicatedStore(members, copies=options.store_copies, reads_replicas=mode.replicas, degraded=degraded)


def _member(url: str, options: StoreOptions, degraded: Callable[[str], None] | None, *, is_brief: bool) -> Member:
    """A store as it is read and written: briefly is about reading, a write has nowhere else to go."""
    from coldstart.stores.replicated import Member
    from coldstart.stores.retrying import BRIEF_POLICY

    if not (is_brief and url.startswith(_REMOTE)):
        store = _open_one(url, options, degraded)
        return Member(store, store)
    bucket = _open_remote(url, options, degraded, is_brief=True)
    return Member(_retrying(bucket, BRIEF_POLICY), _retrying(bucket))


def _of_replica(options: StoreOptions) -> StoreOptions:
    """The options of the replicas' own: endpoint and region, and credentials if they have any."""
    own: dict[str, Any] = {field: getattr(options, f"replica_{field}") for field in _KEYS}
    return options._replace(
        endpoint_url=options.replica_endpoint_url or options.endpoint_url,
        region=options.replica_region or options.region,
        **(own if any(own.values()) else {}),
    )


def _cached(store: Store, options: StoreOptions, degraded: Callable[[str], None] | None) -> Store:
    if not options.cache:
        return store
    from coldstart.stores.cached import CachedStore

    return CachedStore(store, options.cache, limit_bytes=options.cache_bytes, degraded=degraded)
