"""What may be executed. Programs and kernel caches are code, and whoever may change them is inside the worker.

Code is taken from a manifest whose signature was verified, and from a store that is trusted: this process' own memory, or
a folder that nobody but this user and root can change, neither in place nor by putting another folder there. No remote
store is trusted by itself: who may write to a bucket cannot be seen from here, so its owner has to say so.

On the way to the first answer: the standard library only, and a dozen ``lstat`` calls.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from coldstart.stores import folder_of

if TYPE_CHECKING:
    from collections.abc import Iterator

_PARTS = ("refs", "manifests", "blobs", ".flat")
"""Folders of a store that lead to what is executed; those that are not there were never written to."""
_ROOT_USER = 0
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
"""Rights that an access control list gives show among those of the group."""
_MOST_LINKS = 40

_REMEDY = "sign its snapshots (coldstart keys new makes the keys), or set COLDSTART_TRUST_STORE=on if nobody else can write there"


def distrust(store_url: str, *, trust_store: bool, is_signed: bool, snapshot: str = "") -> str:
    """Why code from this store is not to be executed, with the remedy; "" where it is.

    ``store_url``: its address, as for ``open_store``. ``trust_store``: the setting of that name. ``is_signed``: the
    signature of the manifest that lists the code was verified. ``snapshot``: a name whose own folders are looked at too.
    """
    if is_signed or trust_store or store_url.partition("://")[0] == "memory":
        return ""
    folder = folder_of(store_url)
    weakness = _weakness(folder, snapshot) if folder else "only a folder of this user's own is trusted by itself"
    return f"{store_url} is not trusted to give code: {weakness}; {_REMEDY}" if weakness else ""


def _weakness(folder: str, snapshot: str) -> str:
    """How somebody else could have changed what is in ``folder``, "" if nobody could."""
    place = "/"
    try:
        for place in _way_to(os.path.abspath(os.path.expanduser(folder))):
            if found := _way_weakness(place, os.lstat(place)):
                return found
        of_snapshot = (f"refs/{snapshot}", f"manifests/{snapshot}") if snapshot else ()
        inside = (place, *(f"{place}/{part}" for part in (*_PARTS, *of_snapshot)))
        return next(filter(None, map(_inner_weakness, inside)), "")
    except FileNotFoundError:
        return f"there is no {place}"
    except OSError as error:
        return f"{place} cannot be looked at ({error.strerror})"


def _way_to(path: str) -> Iterator[str]:
    """Each folder and symbolic link that the kernel meets on its way to ``path``, whose last part may be a link too."""
    here, rest, links = "/", path.split("/"), 0
    yield here
    while rest:
        part = rest.pop(0)
        if part in ("", "."):
            continue
        here = os.path.dirname(here) if part == ".." else os.path.join(here, part)
        yield here
        if part != ".." and os.path.islink(here):
            links += 1
            if links > _MOST_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            target = os.readlink(here)
            rest[:0] = target.split("/")
            here = "/" if target.startswith("/") else os.path.dirname(here)


def _way_weakness(place: str, status: os.stat_result) -> str:
    """In a folder with the sticky bit (/tmp) others may write, and yet not move or replace what is this user's."""
    if status.st_uid not in (_ROOT_USER, os.geteuid()):
        return f"{place} belongs to user {status.st_uid}"
    is_open = stat.S_ISDIR(status.st_mode) and status.st_mode & _WRITABLE_BY_OTHERS
    return f"others may write to {place}" if is_open and not status.st_mode & stat.S_ISVTX else ""


def _inner_weakness(place: str) -> str:
    """Where others may write, sticky or not, they may add refs and manifests."""
    try:
        status = os.lstat(place)
    except FileNotFoundError:
        return ""
    if not stat.S_ISDIR(status.st_mode):
        return f"{place} is not a folder"
    return _way_weakness(place, status) or (
        f"others may write to {place}" if status.st_mode & _WRITABLE_BY_OTHERS else ""
    )
