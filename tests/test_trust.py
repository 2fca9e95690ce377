"""What may be executed: from a verified signature, or from a store that nobody else can change."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from coldstart import trust
from coldstart.stores import folder_of

OTHER_USER = 12345

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")


@pytest.fixture
def folder(tmp_path):
    """A store's folder as a first capture makes it, and the way to it safe from the root on."""
    os.chmod(tmp_path, 0o700)
    store = tmp_path / "store"
    for part in ("refs/minilm", "manifests/minilm", "blobs/00"):
        (store / part).mkdir(parents=True, mode=0o700)
    os.chmod(store, 0o700)
    return store


def reason(url, *, trust_store=False, is_signed=False, snapshot="minilm"):
    """Why code of snapshot minilm is not executed."""
    return trust.distrust(str(url), trust_store=trust_store, is_signed=is_signed, snapshot=snapshot)


def test_a_folder_of_this_user_alone_is_trusted(folder):
    """A folder that the store itself has made is trusted, by its address, by its path and through the user's own link."""
    link = folder.parent / "link"
    link.symlink_to(folder)
    assert reason(folder) == reason(f"file://{folder}") == reason(link) == reason(folder, snapshot="other") == ""


@pytest.mark.parametrize("url", ["s3://bucket/prefix", "r2://bucket", "gopher://x", "off"])
def test_what_is_no_folder_of_this_machine_is_not_trusted(url, tmp_path, monkeypatch):
    """A remote store is not trusted, and the reason names the store and both remedies."""
    monkeypatch.chdir(tmp_path)
    told = reason(url)
    assert told.startswith(f"{url} is not trusted")
    assert "sign" in told
    assert "COLDSTART_TRUST_STORE=on" in told


def test_memory_of_this_process_is_trusted():
    """Nobody else can write to a store in this process' memory."""
    assert reason("memory://tests") == ""


@pytest.mark.parametrize("url", ["s3://bucket", "/nowhere"])
def test_a_signature_or_the_setting_is_enough(url):
    """A verified signature needs no trust in the store, and the setting vouches for any store."""
    assert reason(url, is_signed=True) == reason(url, trust_store=True) == ""


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777, 0o1777])
@pytest.mark.parametrize("part", ["", "refs", "manifests", "blobs", "refs/minilm", "manifests/minilm"])
def test_a_folder_that_others_may_write_to_is_not_trusted(folder, part, mode):
    """Group or world may add refs, manifests or blobs: not trusted, the sticky bit or not; the reason names the folder."""
    os.chmod(folder / part, mode)
    assert f"others may write to {str(folder / part).rstrip('/')}" in reason(folder)


def test_only_the_snapshot_that_is_asked_for_is_looked_at(folder):
    """What others may do to one snapshot's folders says nothing of another's."""
    os.chmod(folder / "refs/minilm", 0o777)
    assert reason(folder, snapshot="other") == ""


@needs_root
@pytest.mark.parametrize("part", ["", "refs", "manifests/minilm"])
def test_a_folder_of_another_user_is_not_trusted(folder, part):
    """Its owner could change it whenever they like."""
    os.chown(folder / part, OTHER_USER, OTHER_USER)
    assert f"belongs to user {OTHER_USER}" in reason(folder)


@needs_root
def test_a_user_trusts_what_root_and_the_user_made(folder):
    """As an ordinary user: a folder of root's or the user's own is trusted, one of a third user is not."""
    code = (
        "import os, sys; from coldstart import trust; os.setuid(int(sys.argv[2]));"
        "print(trust.distrust(sys.argv[1], trust_store=False, is_signed=False))"
    )

    def as_user(user):
        command = [sys.executable, "-c", code, str(folder), str(user)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    for place in (folder, *folder.parents):  # pytest's folders are private to root
        if not os.stat(place).st_mode & 0o001:
            os.chmod(place, 0o755)
    for place in (folder, *folder.iterdir()):
        os.chmod(place, 0o755)
    assert as_user(OTHER_USER) == ""
    os.chown(folder, OTHER_USER, OTHER_USER)
    assert as_user(OTHER_USER) == ""
    assert f"belongs to user {OTHER_USER}" in as_user(OTHER_USER + 1)


def test_a_folder_that_is_not_there_is_not_trusted(folder):
    """Whoever makes it first could be anybody."""
    assert f"there is no {folder.parent / 'absent'}" in reason(folder.parent / "absent")


def test_a_store_without_some_of_its_folders_is_trusted(tmp_path):
    """An empty store of this user's own holds nothing that could be executed."""
    os.chmod(tmp_path, 0o700)
    assert reason(tmp_path) == ""


def test_a_way_that_others_may_replace_is_not_trusted(folder):
    """Whoever may write to a folder above the store can put another store in its place."""
    os.chmod(folder.parent, 0o777)
    assert f"others may write to {folder.parent}" in reason(folder)


def test_below_a_sticky_folder_what_is_own_stays_own(folder):
    """In /tmp others may write, and cannot move this user's folder away."""
    os.chmod(folder.parent, 0o1777)
    assert reason(folder) == ""


def test_a_link_through_a_folder_of_others_is_not_trusted(folder):
    """A symbolic link is followed as the kernel follows it, and each folder on its way is looked at."""
    shared = folder.parent / "shared"
    shared.mkdir()
    (shared / "inner").symlink_to(folder)
    entry = folder.parent / "entry"
    entry.symlink_to("shared/../shared/inner")
    assert reason(entry) == ""
    os.chmod(shared, 0o777)
    assert f"others may write to {shared}" in reason(entry)


@needs_root
def test_a_link_of_another_user_is_not_trusted(folder):
    """In a sticky folder anybody may have made the link, and may point it elsewhere."""
    link = folder.parent / "link"
    link.symlink_to(folder)
    os.chown(link, OTHER_USER, OTHER_USER, follow_symlinks=False)
    assert f"{link} belongs to user {OTHER_USER}" in reason(link)


def test_a_link_inside_the_store_is_not_trusted(folder):
    """The store makes no links: one of them leads to what was not looked at."""
    (folder / "refs").rename(folder.parent / "elsewhere")
    (folder / "refs").symlink_to(folder.parent / "elsewhere")
    assert f"{folder / 'refs'} is not a folder" in reason(folder)


def test_links_in_a_circle_are_not_trusted(tmp_path):
    """A way without an end is told, not followed for ever."""
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert "symbolic links" in reason(tmp_path / "a")


def test_a_file_instead_of_a_folder_is_not_trusted(tmp_path):
    """Nothing of it can be a store."""
    os.chmod(tmp_path, 0o700)
    (tmp_path / "file").write_bytes(b"")
    assert "is not a folder" in reason(tmp_path / "file")


@pytest.mark.parametrize(
    ("url", "path"),
    [("/a/b", "/a/b"), ("file:///a%20b", "/a b"), ("file://localhost/a", "/a"), ("s3://b", ""), ("memory://", "")],
)
def test_an_address_names_its_folder(url, path):
    """The folder that is looked at is the one that the store opens."""
    assert folder_of(url) == path
