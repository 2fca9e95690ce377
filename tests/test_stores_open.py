"""Addresses and options of stores: what opens what, what is refused, what is imported, what is never shown."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from coldstart.errors import StoreSetupError
from coldstart.stores import SCHEMES, StoreOptions, open_store
from coldstart.stores.local import LocalStore
from coldstart.stores.retrying import RetryingStore

if TYPE_CHECKING:
    from pathlib import Path

SECRETS = ("planted-id", "planted-secret", "planted-token")
PLANTED = StoreOptions("https://example.org", "eu", *SECRETS, "account")


def test_memory_stores_are_shared_by_name():
    """Two openings of one name see each other's objects, another name does not."""
    open_store("memory://shared-by-name").put("k", b"1")
    assert open_store("memory://shared-by-name").get("k").data == b"1"
    assert list(open_store("memory://another-name").list("")) == []


@pytest.mark.parametrize("form", ["{}", "file://{}", "file://localhost{}"])
def test_a_folder_opens_by_path_and_by_address(tmp_path: Path, form: str):
    """A plain path and both forms of a file address open the same folder, unwrapped and not yet made."""
    store = open_store(form.format(tmp_path / "store"))
    assert isinstance(store, LocalStore)
    assert store.root == str(tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_plain_path_may_be_relative_or_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A relative path starts at the working directory, a tilde at the user's home."""
    monkeypatch.chdir(tmp_path)
    assert open_store("some/folder").url == f"file://{tmp_path}/some/folder"
    assert open_store("~/folder").url == f"file://{tmp_path}/home/folder"


@pytest.mark.parametrize("name", ["plain", "a b", "100%", "a%20b", "%", "ümlaut", "q?x#y"])
def test_an_address_opens_the_folder_that_gave_it(tmp_path: Path, name: str):
    """The url of a folder's store, whatever its name holds, opens that folder again."""
    store = LocalStore(tmp_path / name)
    store.put("k", name.encode())
    assert open_store(store.url).get("k").data == name.encode()


def test_an_escaped_address_is_unescaped(tmp_path: Path):
    """A percent-encoded file address names the folder with the real characters."""
    assert open_store(f"file://{tmp_path}/a%20b").url == f"file://{tmp_path}/a b"


@pytest.mark.parametrize("url", ["file://relative/path", "file://host/path", "file://", "", "file:///a%00b", "a\0b"])
def test_a_folder_address_that_cannot_be_used_is_refused(url: str):
    """A host, a missing path and a NUL byte are errors at once, not a surprising folder later."""
    with pytest.raises(StoreSetupError):
        open_store(url)


@pytest.mark.parametrize("url", ["gs://bucket/x", "https://id:planted-secret@host/x", "S3://bucket", "://x"])
def test_an_unknown_scheme_names_the_known_ones(url: str):
    """The error lists every scheme there is, and repeats nothing of the address but its scheme."""
    with pytest.raises(StoreSetupError) as caught:
        open_store(url)
    assert all(f"{scheme}://" in str(caught.value) for scheme in SCHEMES)
    assert "planted-secret" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["s3", "r2"])
def test_a_bucket_opens_under_the_retrying_wrapper(scheme: str):
    """A remote store is retried, keeps the address it was opened by, and opening it makes no request."""
    store = open_store(f"{scheme}://bucket/some/prefix/", PLANTED)
    assert isinstance(store, RetryingStore)
    assert store.url == f"{scheme}://bucket/some/prefix"
    store.close()


def test_without_boto3_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    """A missing boto3 is StoreSetupError with the pip command, at the first write: reading does without it."""
    monkeypatch.setitem(sys.modules, "boto3.session", None)
    store = open_store("s3://bucket", PLANTED)
    with pytest.raises(StoreSetupError, match=r'pip install "coldstart-gpu\[s3\]"'):
        store.put("key", b"")


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "http_proxy"])
def test_behind_a_proxy_boto3_reads(monkeypatch: pytest.MonkeyPatch, variable: str):
    """The thin reader knows no proxies, so where the environment names one it is not used."""
    from coldstart.stores.location import locate
    from coldstart.stores.s3_reader import reads_directly

    location = locate("s3://bucket", PLANTED)
    assert reads_directly(location, PLANTED)
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    assert not reads_directly(location, PLANTED)


def test_options_show_no_secret():
    """repr, str and formatting mask id, secret and token and show the rest; a pickle carries all, for another process."""
    for shown in (repr(PLANTED), str(PLANTED), f"{PLANTED}", f"{[PLANTED]}", f"{PLANTED!r:>400}"):
        assert not [secret for secret in SECRETS if secret in shown]
        assert "https://example.org" in shown
    assert "access_key_id=''" in repr(StoreOptions())
    assert pickle.loads(pickle.dumps(PLANTED)) == PLANTED


_LIGHT = """
import json, sys
bare = set(sys.modules)
from coldstart.stores import open_store
store = open_store(sys.argv[1])
after_opening = set(sys.modules) - bare
store.put("k", b"data")
store.read_into("k", memoryview(bytearray(4)))
print(json.dumps([sorted(after_opening), sorted(set(sys.modules) - bare)]))
"""
_HEAVY = {
    "boto3", "botocore", "pydantic", "structlog", "numpy", "torch", "zstandard", "dataclasses", "inspect", "asyncio",
    "subprocess", "logging", "importlib.metadata", "urllib", "email", "http", "pathlib", "random", "tempfile", "shutil",
}  # fmt: skip


def test_a_folder_is_opened_and_used_with_the_standard_library(tmp_path: Path):
    """In a fresh process, opening, writing and reading a file:// store imports nothing heavy; the hash comes on first use."""
    command = [sys.executable, "-c", _LIGHT, f"file://{tmp_path}/store"]
    output = subprocess.run(command, check=True, capture_output=True, timeout=60).stdout
    after_opening, after_use = json.loads(output)
    assert not _HEAVY & set(after_use)
    assert "blake3" not in after_opening
    stores = {name for name in after_use if name.startswith(("coldstart.stores", "coldstart.testing"))}
    assert stores == {"coldstart.stores", "coldstart.stores.base", "coldstart.stores.local"}
