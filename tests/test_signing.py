"""Signatures of refs and manifests: what is signed reads back, and nothing else does."""

from __future__ import annotations

import json
import re

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from coldstart import config, program_start
from coldstart.cli import main
from coldstart.errors import ConfigError, UntrustedError
from coldstart.manifest import newest_ref_key, ref_from_json, ref_key, ref_to_json
from coldstart.repository import Repository
from coldstart.signing import SIGNING_KEY_FORM, Seals, key_id, new_keys, seals_of, verifying_key_of
from coldstart.stores.memory import MemoryStore
from tests.generations import KEY, OTHER_KEY, manifest_of, publish

PAIR, OTHER_PAIR = new_keys(), new_keys()
REF = ref_key("model", KEY.digest)


@pytest.fixture
def store():
    """The objects."""
    return MemoryStore()


@pytest.fixture
def writer(store):
    """A repository that signs."""
    return Repository(store, seals=Seals(signing_key=PAIR.signing))


def reader(store, *keys, **options):
    """A repository that only verifies, with the writer's key unless others are given."""
    return Repository(store, seals=Seals(verifying_keys=keys or (PAIR.verifying,), **options))


def rewrite(store, key, old, new):
    """Change a stored document, which has ``old`` in it."""
    data = store.get(key).data
    assert old in data
    store.put(key, data.replace(old, new))


def refused(repository, key):
    """Why the manifest is refused."""
    with pytest.raises(UntrustedError) as caught:
        repository.manifest(key, name="model")
    return str(caught.value)


# --- what is signed ----------------------------------------------------------------------------------------------------


def test_what_was_signed_is_used(store, writer):
    """Who has the public key alone finds ref and manifest good, and the manifest says that it was verified."""
    ref = publish(writer)
    found = reader(store).look_up("model", KEY)
    assert (found.ref._replace(signature=""), found.distrust) == (ref, "")
    assert reader(store).manifest(ref.manifest, name="model").signature.startswith(f"ed25519:{key_id(PAIR.verifying)}:")


def test_whoever_signs_trusts_its_own_key(writer):
    """A worker with a signing key, and nothing else, uses what it wrote."""
    ref = publish(writer)
    assert writer.look_up("model", KEY).distrust == ""
    assert writer.manifest(ref.manifest, name="model").signature


def test_the_signature_is_one_that_any_other_implementation_verifies(store, writer):
    """The bytes signed are a line with the object's key, and the stored document with an empty signature."""
    import base64

    key = publish(writer).manifest
    data = store.get(key).data
    _, signer, text = json.loads(data)["signature"].split(":")
    signed = b"coldstart " + key.encode() + b"\n" + re.sub(rb'"signature":"ed25519:[^"]*"', b'"signature":""', data)
    public = Ed25519PublicKey.from_public_bytes(base64.urlsafe_b64decode(PAIR.verifying[4:] + "="))
    public.verify(base64.urlsafe_b64decode(text + "=="), signed)
    assert signer == key_id(PAIR.verifying)


def test_a_ref_without_a_signature_is_written_as_ever(store):
    """Without a key nothing is signed, and a ref has no field for it: older readers see what they know."""
    publish(Repository(store))
    assert b"signature" not in store.get(REF).data


def test_a_signed_ref_reads_back(store, writer):
    """A signature is a field of a ref like any other; the newest ref has one too."""
    publish(writer)
    for key in (REF, newest_ref_key("model")):
        data = store.get(key).data
        assert ref_to_json(ref_from_json(data)) == data
        assert ref_from_json(data).signature.startswith("ed25519:")


# --- what is refused ---------------------------------------------------------------------------------------------------


def test_what_is_not_signed_is_refused(store):
    """An unsigned ref is found, so that it can be replaced, and not to be used; an unsigned manifest is an error."""
    ref = publish(Repository(store))
    found = reader(store).look_up("model", KEY)
    assert found.ref == ref
    assert found.distrust == f"{REF} is not signed"
    assert refused(reader(store), ref.manifest) == f"{ref.manifest} is not signed"


def test_another_key_is_refused(store, writer):
    """A good signature of a key that nobody named is told by the key's id."""
    ref = publish(writer)
    told = refused(reader(store, OTHER_PAIR.verifying), ref.manifest)
    assert key_id(PAIR.verifying) in told
    assert "none of COLDSTART_VERIFY_KEYS" in told


@pytest.mark.parametrize(("old", "new"), [(b'"tree":null', b'"tree":true'), (b"1700000000.0", b"1700000001.0")])
def test_a_changed_manifest_is_refused(store, writer, old, new):
    """One changed value, wherever it is."""
    ref = publish(writer)
    rewrite(store, ref.manifest, old, new)
    assert "changed after it was signed" in refused(reader(store), ref.manifest)


def test_every_changed_byte_of_a_ref_is_noticed(store, writer):
    """No byte of a signed ref can be altered so that the ref still reads and counts as good."""
    publish(writer)
    data = store.get(REF).data
    ref = ref_from_json(data)
    seals = Seals(verifying_keys=(PAIR.verifying,))
    assert seals.check(ref, data, REF).is_good
    for position in range(len(data)):
        altered = bytearray(data)
        altered[position] ^= 1
        assert not seals.check(ref, bytes(altered), REF).is_good


@given(st.binary(max_size=40), st.integers(0, 400), st.integers(0, 40))
def test_no_splice_passes(piece, position, removed):
    """Bytes put in, taken out or replaced anywhere in a signed document: only the document itself is good."""
    store = MemoryStore()
    publish(Repository(store, seals=Seals(signing_key=PAIR.signing), unique=lambda: "0a"))
    data = store.get(REF).data
    spliced = data[:position] + piece + data[position + removed :]
    verdict = Seals(verifying_keys=(PAIR.verifying,)).check(ref_from_json(data), spliced, REF)
    assert verdict.is_good == (spliced == data)


def test_a_signature_that_stands_twice_is_refused(store, writer):
    """A document that holds its own signature again could hide another place for it."""
    ref = publish(writer)
    signature = json.loads(store.get(ref.manifest).data)["signature"].encode()
    rewrite(store, ref.manifest, b'"platform":{}', b'"platform":{"signature":"' + signature + b'"}')
    assert "changed after it was signed" in refused(reader(store), ref.manifest)


@pytest.mark.parametrize(
    "signature", ["x", "ed25519:", "ed25519:0123456789abcdef:zz", "rsa:0123456789abcdef:" + "A" * 86]
)
def test_a_signature_of_another_kind_is_refused(store, writer, signature):
    """What is not of the one form is not taken for a signature."""
    ref = publish(writer)
    own = json.loads(store.get(ref.manifest).data)["signature"]
    rewrite(store, ref.manifest, own.encode(), signature.encode())
    assert "unknown kind" in refused(reader(store), ref.manifest)


def test_a_manifest_of_another_place_is_refused(store, writer):
    """An older generation's signed manifest, put where the current one is, is noticed."""
    old, new = publish(writer), publish(writer)
    store.put(new.manifest, store.get(old.manifest).data)
    assert "moved there from elsewhere" in refused(reader(store), new.manifest)
    assert reader(store).manifest(old.manifest, name="model").signature


def test_a_manifest_of_another_snapshot_is_no_ref_of_this_one(store, writer):
    """A signed ref of another key, put where this key's is, is refused as before."""
    publish(writer, key=OTHER_KEY)
    store.put(REF, store.get(ref_key("model", OTHER_KEY.digest)).data)
    with pytest.raises(Exception, match="names another snapshot"):
        reader(store).look_up("model", KEY)


# --- policies ----------------------------------------------------------------------------------------------------------


def test_warn_tells_and_uses(store):
    """With policy warn an unsigned snapshot is used, each document of it is told, and it does not count as signed."""
    ref = publish(Repository(store))
    told: list[str] = []
    repository = reader(store, policy="warn", warn=told.append)
    assert repository.look_up("model", KEY).distrust == ""
    assert repository.manifest(ref.manifest, name="model") == manifest_of()
    assert [line.split(" is ")[0] for line in told] == [REF, ref.manifest]


def test_off_checks_nothing(store, writer):
    """With policy off a wrong signature is not looked at, and no manifest counts as signed."""
    ref = publish(writer)
    rewrite(store, ref.manifest, b'"tree":null', b'"tree":true')
    assert reader(store, policy="off").manifest(ref.manifest, name="model").signature == ""


def test_a_claimed_signature_does_not_count_without_a_key(store, writer):
    """Where nothing is verified a manifest's signature is not shown: whoever asks for it asks whether it was verified."""
    ref = publish(writer)
    assert Repository(store).manifest(ref.manifest, name="model").signature == ""


def test_keys_are_replaced_one_after_another(store, writer):
    """While the writers change to a new key, readers take what either of them has signed."""
    old = publish(writer)
    new = publish(Repository(store, seals=Seals(signing_key=OTHER_PAIR.signing, verifying_keys=(PAIR.verifying,))))
    both = reader(store, PAIR.verifying, OTHER_PAIR.verifying)
    assert all(both.manifest(ref.manifest, name="model").signature for ref in (old, new))
    assert both.look_up("model", KEY).distrust == ""


def test_a_refused_ref_can_be_replaced(store, writer):
    """A worker that signs replaces an unsigned generation by the next one, by compare-and-swap."""
    publish(Repository(store))
    replaces = writer.look_up("model", KEY)
    assert replaces.distrust
    assert writer.next_generation("model", KEY, replaces.ref) == 2
    publish(writer)
    assert reader(store).look_up("model", KEY).distrust == ""


@pytest.mark.parametrize(("policy", "refuses"), [("require", True), ("warn", False), ("off", False)])
def test_a_worker_without_a_key_knows_that_its_own_is_refused(policy, refuses):
    """With require and no signing key, what this worker would store is of no use to anybody."""
    assert Seals(policy=policy, verifying_keys=(PAIR.verifying,)).refuses_own is refuses
    assert not Seals(policy=policy).refuses_own
    assert not Seals(policy=policy, signing_key=PAIR.signing).refuses_own


# --- a store that was set back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["require", "warn", "off"])
def test_generations_below_the_minimum_are_refused(store, writer, policy):
    """A ref and a manifest of an older generation, good signatures or not, are refused by every policy."""
    old = publish(writer)
    repository = reader(store, policy=policy, minimum_generation=2)
    assert "COLDSTART_MINIMUM_GENERATION (2)" in repository.look_up("model", KEY).distrust
    assert "COLDSTART_MINIMUM_GENERATION" in refused(repository, old.manifest)
    new = publish(writer)
    assert repository.look_up("model", KEY).distrust == ""
    assert repository.manifest(new.manifest, name="model").generation == 2


def test_new_generations_begin_with_the_minimum(store):
    """What is made after a minimum was set is not refused by it, also for a key that has no generation yet."""
    repository = Repository(store, seals=Seals(minimum_generation=7))
    assert repository.next_generation("model", KEY, repository.look_up("model", KEY).ref) == 7
    publish(Repository(store))
    assert repository.next_generation("model", KEY, repository.look_up("model", KEY).ref) == 7


# --- keys --------------------------------------------------------------------------------------------------------------


def test_keys_are_texts_that_settings_take():
    """Both halves of a new pair are values of their settings, and the public half is that of the private one."""
    settings = config.load(
        {"HOME": "/h", "COLDSTART_SIGNING_KEY": PAIR.signing, "COLDSTART_VERIFY_KEYS": PAIR.verifying}
    )
    assert (settings.signing_key, settings.verify_keys) == (PAIR.signing, PAIR.verifying)
    assert verifying_key_of(PAIR.signing) == PAIR.verifying
    assert re.fullmatch(SIGNING_KEY_FORM, PAIR.signing)


def test_a_signing_key_is_not_shown():
    """Neither settings, nor a pair, nor seals show it."""
    settings = config.load({"HOME": "/h", "COLDSTART_SIGNING_KEY": PAIR.signing})
    for shown in (repr(settings), str(settings.shown()), repr(PAIR), repr(seals_of(settings))):
        assert PAIR.signing not in shown


def test_seals_are_made_from_settings(tmp_path, store):
    """The key comes from its variable or from a file, the public ones are a list."""
    (tmp_path / "key").write_text(f"{PAIR.signing}\n")
    for variable, value in (("COLDSTART_SIGNING_KEY", PAIR.signing), ("COLDSTART_SIGNING_KEY_FILE", f"{tmp_path}/key")):
        keys = f"{OTHER_PAIR.verifying} , {PAIR.verifying}"
        settings = config.load({"HOME": "/h", variable: value, "COLDSTART_VERIFY_KEYS": keys})
        assert seals_of(settings).verifying_keys == (PAIR.verifying, OTHER_PAIR.verifying)
    assert not seals_of(config.load({"HOME": "/h"})).checks


@pytest.mark.parametrize("content", [None, b"", b"cvk_" + b"A" * 43, b"\xff" * 47, b"csk_" + b"A" * 9000])
def test_a_key_file_that_is_none_is_an_error_that_shows_nothing(tmp_path, content):
    """The message names the file and not what is in it."""
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="COLDSTART_SIGNING_KEY_FILE") as caught:
        seals_of(config.load({"HOME": "/h", "COLDSTART_SIGNING_KEY_FILE": str(path)}))
    assert str(path) in str(caught.value)
    assert "AAAA" not in str(caught.value)


@pytest.mark.parametrize("variable", ["COLDSTART_SIGNING_KEY", "COLDSTART_VERIFY_KEYS"])
def test_a_key_of_the_wrong_half_is_refused(variable):
    """The halves cannot be mixed up: a secret key among the public ones is an error, and not shown."""
    wrong = PAIR.verifying if variable == "COLDSTART_SIGNING_KEY" else PAIR.signing
    with pytest.raises(ConfigError, match=variable) as caught:
        config.load({"HOME": "/h", variable: wrong})
    assert PAIR.signing not in str(caught.value)


def test_required_signatures_need_a_key():
    """Who asks for them in so many words, and names no key, is told at once and not by every snapshot."""
    with pytest.raises(ConfigError, match="COLDSTART_SIGNATURES=require needs a key"):
        config.load({"HOME": "/h", "COLDSTART_SIGNATURES": "require"})
    assert config.load({"HOME": "/h"}).signatures == "require"


def test_without_cryptography_nothing_signed_is_used(store, writer, monkeypatch):
    """Where the package is missing, reading says how to install it, and so does writing."""
    import sys

    ref = publish(writer)
    for name in list(sys.modules):
        if name.startswith("cryptography"):
            monkeypatch.setitem(sys.modules, name, None)
    assert 'pip install "coldstart-gpu[signing]"' in refused(reader(store), ref.manifest)
    with pytest.raises(ConfigError, match="signing"):
        Seals(signing_key=PAIR.signing).signed_manifest(manifest_of(), "manifests/model/000001-0a")


def test_the_command_makes_a_pair_that_settings_take(monkeypatch, capsys, tmp_path):
    """``keys new`` prints both settings, or keeps the secret one in a file of this user's alone; ``keys show`` the rest."""
    assert main(["keys", "new"]) == 0
    lines = dict(line.split("=", 1) for line in capsys.readouterr().out.splitlines())
    assert verifying_key_of(lines["COLDSTART_SIGNING_KEY"]) == lines["COLDSTART_VERIFY_KEYS"]
    path = tmp_path / "key"
    assert main(["keys", "new", "--file", str(path)]) == 0
    printed = capsys.readouterr().out
    secret = path.read_text().strip()
    assert path.stat().st_mode & 0o777 == 0o600
    assert secret not in printed
    monkeypatch.setenv("COLDSTART_SIGNING_KEY_FILE", str(path))
    assert main(["keys", "show"]) == 0
    assert capsys.readouterr().out.split() == [key_id(verifying_key_of(secret)), verifying_key_of(secret)]


def test_the_command_overwrites_no_key(capsys, tmp_path):
    """A key that is there already stays, and the command says so."""
    path = tmp_path / "key"
    path.write_text("precious")
    assert main(["keys", "new", "--file", str(path)]) == 1
    assert path.read_text() == "precious"
    assert "csk_" not in capsys.readouterr().out


def test_without_a_key_there_is_none_to_show(capsys):
    """The command says how to make one."""
    assert main(["keys", "show"]) == 1
    assert "coldstart keys new" in capsys.readouterr().err


def test_helpers_of_a_worker_do_not_have_its_signing_key(monkeypatch):
    """The processes that decode what a store holds are told what they need, and the key is not part of it."""
    monkeypatch.setenv("COLDSTART_SIGNING_KEY", PAIR.signing)
    monkeypatch.setenv("COLDSTART_VERIFY_KEYS", PAIR.verifying)
    environment = config.helper_environment({"A": "b"})
    assert PAIR.signing not in environment.values()
    assert (environment["A"], environment["COLDSTART_VERIFY_KEYS"]) == ("b", PAIR.verifying)


@pytest.mark.parametrize(
    ("settings", "may_run"),
    [
        ({}, False),
        ({"verify_keys": PAIR.verifying}, True),
        ({"signing_key": PAIR.signing}, True),
        ({"verify_keys": PAIR.verifying, "signatures": "warn"}, False),
        ({"verify_keys": PAIR.verifying, "signatures": "off"}, False),
        ({"trust_store": True}, True),
    ],
)
def test_programs_of_a_remote_store_run_where_signatures_are_required(settings, may_run):
    """Required signatures are verified before anything of a snapshot is used, so its programs may be; warnings are not enough."""
    found = program_start.accepted(config.load({"HOME": "/h"}, store="s3://bucket", **settings), "cpu", "model")
    assert ("is not trusted to give code" not in found.obstacle) is may_run
    assert may_run or not found.identities
