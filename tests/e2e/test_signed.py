"""Signed snapshots in real processes: what nobody vouches for is not used, said so, and replaced by who may."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest

from coldstart.manifest import manifest_from_json
from coldstart.signing import new_keys
from coldstart.stores import open_store
from tests.starts import SCALED, SCALES, Project

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from coldstart.stores import StoreOptions

PAIR = new_keys()
SIGNS = {"COLDSTART_SIGNING_KEY": PAIR.signing}
VERIFIES = {"COLDSTART_VERIFY_KEYS": PAIR.verifying}


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """SCALES with two signed generations. Not to be changed."""
    project = Project(tmp_path_factory.mktemp("signed"))
    project.write(SCALES)
    for arguments in ((), ("--fresh",)):
        start = project.run(*arguments, **SIGNS)
        assert start.capture["published"], start.capture
    return project


@pytest.fixture
def project(signed: Project, tmp_path: Path) -> Project:
    """A copy of it."""
    return signed.copy(tmp_path / "signed")


def test_a_worker_with_the_public_key_restores(project: Project) -> None:
    """Signed by one worker, proven in a child that verifies too, restored by another that has only the public key."""
    start = project.run(**VERIFIES)
    assert (start.kind, start.reason, start.output, start.record["generation"]) == ("restored", "", SCALED, 2)


def test_what_is_not_signed_is_not_used_and_is_replaced(tmp_path: Path) -> None:
    """Unsigned and required: a labelled fallback; a worker that signs replaces it, and then everybody restores."""
    project = Project(tmp_path)
    project.write(SCALES)
    project.run()
    start = project.run(**VERIFIES)
    assert (start.kind, start.output) == ("fallback", SCALED)
    assert "UntrustedError" in start.reason
    assert "is not signed" in start.reason
    assert "no signing key" in start.capture["reason"]
    start = project.run(**SIGNS)
    assert (start.kind, start.capture["published"]) == ("fallback", True)
    start = project.run(**VERIFIES)
    assert (start.kind, start.record["generation"]) == ("restored", 2)


def test_a_changed_manifest_is_the_previous_generation(project: Project) -> None:
    """A manifest that was changed in the store is not used: the one before it is, and the start says why."""
    path = project.objects("manifests")[-1]
    path.write_bytes(path.read_bytes().replace(b'"coldstart":"', b'"coldstart":"1'))
    assert manifest_from_json(path.read_bytes()).generation == 2
    start = project.run(**VERIFIES)
    assert (start.kind, start.record["recovered_by"], start.output) == ("restored", "previous_generation", SCALED)
    assert "changed after it was signed" in start.reason


def test_a_changed_ref_is_not_used(project: Project) -> None:
    """A ref that points at the older generation, by hand, is a fallback and not a rollback."""
    path = project.ref("scales")
    document = json.loads(path.read_bytes())
    document |= {"generation": 1, "manifest": document["previous_manifest"]}
    document |= {"previous_generation": 0, "previous_manifest": ""}
    document.pop("history")
    path.write_text(json.dumps(document, sort_keys=True, separators=(",", ":")))
    start = project.run(**VERIFIES)
    assert (start.kind, start.output) == ("fallback", SCALED)
    assert "changed after it was signed" in start.reason
    assert project.run().record["generation"] == 1  # who does not verify follows it


def test_a_store_that_was_set_back_is_noticed(project: Project) -> None:
    """With a minimum generation the good signatures of yesterday are refused, and the next one begins above it."""
    start = project.run(COLDSTART_MINIMUM_GENERATION="5", **SIGNS)
    assert (start.kind, start.capture["published"], start.capture["generation"]) == ("fallback", True, 5)
    assert "COLDSTART_MINIMUM_GENERATION" in start.reason
    start = project.run(COLDSTART_MINIMUM_GENERATION="5", **VERIFIES)
    assert (start.kind, start.record["generation"]) == ("restored", 5)


def test_what_a_fetcher_looked_up_is_verified_too(
    tmp_path: Path, new_s3_bucket: Callable[[], str], s3_options: StoreOptions
) -> None:
    """From a bucket, where another process reads ref and manifest: the parent uses what it has verified itself."""
    address = f"s3://{new_s3_bucket()}/snapshots"
    project = Project(tmp_path)
    project.write(SCALES)
    project.environment = {
        "COLDSTART_STORE": address,
        "COLDSTART_ENDPOINT_URL": s3_options.endpoint_url,
        "COLDSTART_REGION": s3_options.region,
        "COLDSTART_ACCESS_KEY_ID": s3_options.access_key_id,
        "COLDSTART_SECRET_ACCESS_KEY": s3_options.secret_access_key,
    }
    assert project.run(**SIGNS).capture["published"]
    start = project.run(**VERIFIES)
    assert (start.kind, start.reason, start.record["engines"]) == ("restored", "", ["process"])
    store = open_store(address, s3_options)
    (key,) = (info.key for info in store.list("manifests/"))
    store.put(key, store.get(key).data.replace(b'"coldstart":"', b'"coldstart":"1'))
    start = project.run(**VERIFIES)
    assert (start.kind, start.output) == ("fallback", SCALED)
    assert "changed after it was signed" in start.reason


def test_who_does_not_sign_does_not_pay(project: Project) -> None:
    """A restored start without a key does not import cryptography; one with a key does."""
    looks = (
        "import sys; from coldstart.cli import main; main(['run', 'handler.py', '--json']);"
        " print(f'[{int(\"cryptography\" in sys.modules)}]')"
    )
    assert project.python("-c", looks, environment={"COLDSTART_CAPTURE": "off"}).document == [0]
    assert project.python("-c", looks, environment={"COLDSTART_CAPTURE": "off", **VERIFIES}).document == [1]


def test_the_key_is_nowhere_in_the_store(project: Project) -> None:
    """No ref, manifest, blob or start record holds the signing key, also after a start that fell back for it."""
    project.run(COLDSTART_MINIMUM_GENERATION="9", **SIGNS)
    deadline = time.monotonic() + 10
    while len(project.objects("starts")) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    for path in project.store.rglob("*"):
        assert not path.is_file() or PAIR.signing.encode()[4:] not in path.read_bytes()
