"""Forms of chunks for GPUs: made by a capture, used by a restore, kept by everybody, and never needed.

On the fake driver and nvCOMP, whose ANS is of its own make; what is around it is real.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import coldstart.devices.cuda_driver as driver
from coldstart.capture import Encoding, Writing, write_generation
from coldstart.codecs import FOR_DEVICES
from coldstart.collect import Rules, collect
from coldstart.commit import confirm, new_blobs
from coldstart.errors import BlobCorruptError, CodecError, ConfigError, ObjectMissingError, StateChangedError
from coldstart.fetch.base import Address
from coldstart.fetch.decoding import ANS, PLANES
from coldstart.frameworks import survey
from coldstart.manifest import FORMS, blob_key, manifest_from_json, manifest_to_json
from coldstart.plan import in_forms, needed
from coldstart.repository import Repository
from coldstart.retention import Retention
from coldstart.save import IN_THREAD, PROCESS, Saving, device_forms
from coldstart.stores import StoreOptions, open_store
from coldstart.stores.memory import MemoryStore
from coldstart.testing import FakeClock
from coldstart.verify import LEVELS, repair, verify, verify_stores
from tests.fake_gpu.machine import FakeMachine, content
from tests.generations import OTHER_KEY, AtPace, capture_of, fetched

CODECS = (PLANES, ANS)
DAY = 86_400.0
ITEMS = 300_000
MANY = 2_200_000
"""Weights that take more than one chunk."""


@pytest.fixture
def machine(fake_gpu_folder, monkeypatch) -> FakeMachine:
    """The GPU that captures and restores of this process find."""
    machine = FakeMachine(fake_gpu_folder)
    monkeypatch.setattr(driver, "open_gpu", lambda *_: machine.gpu)
    monkeypatch.setattr(device_forms, "_nvcomp", machine.frames)
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "fake_gpu"))
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    return machine


@pytest.fixture
def store() -> MemoryStore:
    """The store that is written to."""
    return MemoryStore()


def weights(items: int, seed: int = 3) -> np.ndarray:
    """Trained-looking numbers as bfloat16."""
    numbers = np.random.default_rng(seed).normal(0, 0.02, items).astype("<f4")
    return (numbers.view("<u4") >> 16).astype("<u2")


def state(items: int = ITEMS) -> dict:
    """Weights on the device, one of which there are two, a run of small arrays, noise, and an array of the host."""
    import cupy

    return {
        "large": cupy.asarray(weights(items)),
        "twin": cupy.asarray(weights(items)),
        "small": [cupy.asarray(weights(100 * number)) for number in range(1, 20)],
        "noise": cupy.asarray(np.random.default_rng(1).integers(0, 256, 100_000, np.uint8)),
        "host": np.arange(300_000.0),
    }


def captured(state, **changes):
    """What a worker on a GPU would capture."""
    return capture_of(**changes)._replace(survey=survey(state, gpu=0), device_type="cuda")


def write(capture, store, *, codec="nvcomp-ans", saving=IN_THREAD, pace=lambda: None):
    """A generation with forms."""
    return write_generation(capture, Repository(store), encoding=Encoding(codec, 1), pace=pace, saving=saving)


@pytest.fixture
def written(machine, store):
    """A generation of ``state`` with forms."""
    return write(captured(state()), store)


def raw(manifest, store) -> list[bytes]:
    """The content of all segments, by a processor."""
    arena = fetched(manifest, store)
    return [bytes(arena.readable(number)) for number in range(len(manifest.segments))]


def landed(machine, manifest, store, **options):
    """The content of all segments, by the GPU, and what was told on the way."""
    arena, landing = machine.restored(in_forms(manifest, CODECS), store, device_codecs=CODECS, **options)
    return content(manifest, arena), landing.degraded


def flip(store, blob: str) -> None:
    """Alter a stored blob, here and there."""
    data = bytearray(store.get(blob_key(blob)).data)
    data[len(data) // 2] ^= 1
    store.put(blob_key(blob), bytes(data))


@pytest.mark.parametrize("engine", ["threads", "process"])
def test_weights_on_a_gpu_are_stored_in_both_forms(machine, tmp_path, engine):
    """Each chunk is stored for every machine, and again for GPUs where that pays; both give the same bytes."""
    address = Address(f"file://{tmp_path}", StoreOptions())
    store = open_store(*address, degraded=lambda _: None)
    saving = Saving(PROCESS, address, 256 << 20, 0) if engine == "process" else IN_THREAD
    manifest = write(captured(state(MANY)), store, saving=saving).manifest
    assert manifest.requires == (FORMS,)
    assert manifest_from_json(manifest_to_json(manifest)) == manifest
    items = [manifest.segments[manifest.chunks[form.chunk].segment].item_bytes for form in manifest.forms]
    assert set(items) == {2}
    assert len(manifest.forms) == sum(manifest.segments[chunk.segment].item_bytes == 2 for chunk in manifest.chunks)
    assert {form.codec for form in manifest.forms} == set(FOR_DEVICES)
    assert {form.parameters["nvcomp"] for form in manifest.forms} == {"6.0.0"}
    assert not {chunk.codec for chunk in manifest.chunks} & set(FOR_DEVICES)
    found, degraded = landed(machine, manifest, store, verify_raw=True)
    assert (found, degraded) == (raw(manifest, store), [])
    assert weights(MANY).tobytes() in b"".join(found)


def test_equal_chunks_are_encoded_once(machine, store):
    """Two arrays of the same weights have one blob in each form."""
    written = write(captured(state(MANY)), store)
    forms = {form.chunk: form.blob for form in written.manifest.forms}
    blobs = {}
    for index, chunk in enumerate(written.manifest.chunks):
        if index in forms:
            blobs.setdefault(chunk.raw_hash, set()).add(forms[index])
    assert len(blobs) < len(forms)
    assert all(len(found) == 1 for found in blobs.values())


def test_only_the_form_that_is_wanted_is_fetched(machine, written, store):
    """A restore on the GPU reads forms in place of the chunks that have one, and nothing twice."""
    manifest = written.manifest
    for form in manifest.forms:
        store.delete(blob_key(manifest.chunks[form.chunk].blob))
    found, degraded = landed(machine, manifest, store)
    assert weights(ITEMS).tobytes() in b"".join(found)
    assert degraded == []


def test_machines_without_a_gpu_need_no_form(written, store):
    """A processor reads the generation when all forms are gone."""
    before = raw(written.manifest, store)
    for form in written.manifest.forms:
        store.delete(blob_key(form.blob))
    assert raw(written.manifest, store) == before


@pytest.mark.parametrize("codecs", [(), (PLANES,), (PLANES, "nvcomp-ans/7")])
def test_devices_that_decode_no_such_form_read_the_chunks_own(machine, written, codecs):
    """Without nvCOMP, or with another major version of it, the manifest is fetched as if it had no forms."""
    assert in_forms(written.manifest, codecs).chunks == written.manifest.chunks
    assert in_forms(written.manifest, codecs).forms == ()


def test_chunks_of_the_host_stay_in_their_own_form(written):
    """What belongs into the host's memory is never fetched in a form for devices."""
    everything = written.manifest._replace(host_segments=tuple(range(len(written.manifest.segments))))
    assert in_forms(everything, CODECS).chunks == written.manifest.chunks


def test_nvcomp_that_does_not_load_is_got_over(machine, written, store):
    """Where nvCOMP is installed and fails when it is opened, the chunks' own forms are read, and somebody is told."""

    def broken():
        raise CodecError("nvCOMP could not be loaded")

    found, degraded = landed(machine, written.manifest, store, open_frames=broken)
    assert found == raw(written.manifest, store)
    assert ["nvCOMP could not be loaded" in reason for reason in degraded] == [True]
    flip(store, written.manifest.chunks[written.manifest.forms[0].chunk].blob)
    with pytest.raises(BlobCorruptError):
        landed(machine, written.manifest, store, open_frames=broken)


@pytest.mark.parametrize("engine", ["threads", "process"])
@pytest.mark.parametrize("harm", ["damage", "loss"])
def test_a_form_that_cannot_be_had_is_got_over(machine, tmp_path, harm, engine):
    """A damaged or missing form never reaches nvCOMP: the chunk is read in its own."""
    address = Address(f"file://{tmp_path}", StoreOptions())
    store = open_store(*address, degraded=lambda _: None)
    manifest = write(captured(state()), store).manifest
    expected, blob = raw(manifest, store), manifest.forms[0].blob
    flip(store, blob) if harm == "damage" else store.delete(blob_key(blob))
    found, _ = landed(machine, manifest, store, engine=engine, address=address)
    assert found == expected


def test_a_chunk_that_is_damaged_in_both_forms_fails_the_restore(machine, written, store):
    """What cannot be read in any form is the error that it ever was."""
    form = written.manifest.forms[0]
    flip(store, form.blob)
    flip(store, written.manifest.chunks[form.chunk].blob)
    with pytest.raises(BlobCorruptError):
        landed(machine, written.manifest, store)


def test_a_proof_reads_both_forms(machine, written, store):
    """With ``verify_raw`` a damaged own form fails the restore, though the GPU could do without it."""
    flip(store, written.manifest.chunks[written.manifest.forms[0].chunk].blob)
    landed(machine, written.manifest, store)
    with pytest.raises(BlobCorruptError):
        landed(machine, written.manifest, store, verify_raw=True)


# --- further generations ------------------------------------------------------------------------------------------------


def test_a_further_generation_reuses_both_forms(machine, store):
    """What the parent has is neither encoded nor written again; what changed is, in both forms."""
    model = state()
    first = write(captured(model), store)
    same = write(captured(model, follows=first), store)
    assert (same.manifest.chunks, same.manifest.forms) == (first.manifest.chunks, first.manifest.forms)
    assert same.written_bytes == 0
    model["large"][7] = 1
    changed = write(captured(model, follows=same), store)
    assert len(changed.manifest.forms) == len(first.manifest.forms)
    assert len(set(changed.manifest.blobs) - set(first.manifest.blobs)) == 2
    found, _ = landed(machine, changed.manifest, store, verify_raw=True)
    assert found == raw(changed.manifest, store)


def test_forms_of_another_key_are_reused_while_they_are_young(machine):
    """Where the parent is no generation that is replaced, its forms are asked for; old or missing ones are made anew."""
    clock = FakeClock()
    store = MemoryStore(clock=clock.time)
    repository = Repository(store, clock=clock.time, sleep=clock.sleep)
    encoding = Encoding("nvcomp-ans", 1)

    def follow(parent):
        capture = captured(model, follows=parent, key=OTHER_KEY, generation=1)
        return write_generation(capture, repository, encoding=encoding, pace=lambda: None)

    model = {"w": weights_on_device(1)}
    first = write_generation(captured(model), repository, encoding=encoding, pace=lambda: None)
    (form,) = first.manifest.forms
    assert follow(first).written_bytes == 0
    store.delete(blob_key(form.blob))
    assert follow(first).written_bytes == form.stored_bytes
    clock.advance(3 * DAY)
    assert follow(first).written_bytes == sum(first.manifest.blobs.values())


def test_forms_come_and_go_with_the_setting(machine, store):
    """A generation whose parent has none gets them from chunks that are not copied; one written without has none."""
    model = state()
    plain = write(captured(model), store, codec="auto")
    assert plain.manifest.forms == plain.manifest.requires == ()
    with_forms = write(captured(model, follows=plain), store)
    assert with_forms.manifest.chunks == plain.manifest.chunks
    assert with_forms.manifest.forms
    assert write(captured(model, follows=with_forms), store, codec="auto").manifest.forms == ()


def test_a_state_that_changes_meanwhile_is_noticed(machine, store):
    """A weight that changes between the two forms of its chunk drops the generation."""
    model = state()
    chunks = len(write(captured(model), MemoryStore()).manifest.chunks)
    change = AtPace(chunks, lambda: model["large"].__setitem__(5, 9))
    with pytest.raises(StateChangedError):
        write(captured(model), store, pace=change)
    assert change.calls > chunks


class Lying:
    """nvCOMP that decodes to other bytes than it was given."""

    def __init__(self, machine: FakeMachine) -> None:
        self._real, self._gpu = machine.frames(), machine.gpu

    def __getattr__(self, name):
        return getattr(self._real, name)

    def ans_decode(self, batch, *, item_bytes, stream):
        self._real.ans_decode(batch, item_bytes=item_bytes, stream=stream)
        room = bytearray(8)
        address, _kept = driver_address(room)
        self._gpu.call("cuMemcpyDtoHAsync_v2", address, batch.targets, 8, stream)
        self._gpu.call("cuStreamSynchronize", stream)
        self._gpu.call("cuMemsetD8Async", int.from_bytes(room, "little"), 77, 1, stream)


def driver_address(room: bytearray):
    """The address of host memory, and what keeps it."""
    from coldstart.devices.cuda_memory import host_address

    return host_address(memoryview(room))


def test_an_encoder_that_is_wrong_is_found_out(machine, store, monkeypatch):
    """What does not decode to the bytes of its chunk is not stored, and the error says what to use instead."""
    monkeypatch.setattr(device_forms, "_nvcomp", lambda: Lying(machine))
    with pytest.raises(CodecError, match=r"nvCOMP 6\.0\.0 encoded does not decode.*COLDSTART_CODEC=auto"):
        write(captured(state()), store)


def test_without_a_gpu_it_is_refused():
    """A capture for a processor does not quietly do without."""
    with pytest.raises(ConfigError, match="COLDSTART_CODEC=nvcomp-ans"):
        Writing(capture_of({"w": np.arange(9)}), Repository(MemoryStore()), encoding=Encoding("nvcomp-ans", 1))


# --- who has to know of forms -------------------------------------------------------------------------------------------


def test_the_collector_keeps_both_forms(machine):
    """Blobs of a live generation stay, whatever form they are; those of a forgotten one go."""
    clock = FakeClock()
    store = MemoryStore(clock=clock.time)
    repository = Repository(store, clock=clock.time, sleep=clock.sleep)
    manifests = []
    for number in (1, 2):
        seen = repository.look_up("model", capture_of().key)
        changed = {"w": weights_on_device(number)}
        capture = captured(changed, generation=repository.next_generation("model", capture_of().key, seen.ref))
        written = write_generation(capture, repository, encoding=Encoding("nvcomp-ans", 1), pace=lambda: None)
        repository.publish(written.manifest, written.manifest_key, replaces=seen)
        manifests.append(written.manifest)
    clock.advance(9 * DAY)
    done = collect(repository, Rules(Retention(last=1)))
    assert done.blobs == len(manifests[0].blobs) > len(manifests[0].chunks)
    assert {info.key for info in store.list("blobs/")} == set(map(blob_key, manifests[1].blobs))


def weights_on_device(seed: int):
    """An array of the device that depends on its number."""
    import cupy

    return cupy.asarray(weights(100_000, seed))


def test_verification_looks_at_both_forms(written, store):
    """On every level a missing form is found; a damaged one, or one with a table that lies, where bytes are read."""
    manifest = written.manifest
    assert list(verify(manifest, store)) == []
    form = manifest.forms[-1]
    lying = manifest._replace(forms=(*manifest.forms[:-1], form._replace(parameters={"block_bytes": 8192})))
    assert [(found.chunk, found.blob) for found in verify(lying, store)] == [(form.chunk, form.blob)]
    flip(store, form.blob)
    assert [(found.chunk, found.blob) for found in verify(manifest, store)] == [(form.chunk, form.blob)]
    store.delete(blob_key(form.blob))
    for level in LEVELS:
        assert [(found.chunk, found.blob) for found in verify(manifest, store, level=level)] == [
            (form.chunk, form.blob)
        ]


def test_a_form_is_mended_from_a_replica(written, store):
    """A replica that lost a form gets it back from one that has it."""
    from coldstart.stores.replicated import Member, ReplicatedStore

    manifest, replica = written.manifest, MemoryStore()
    for info in store.list(""):
        replica.put(info.key, store.get(info.key).data)
    form = manifest.forms[-1]
    replica.delete(blob_key(form.blob))
    both = ReplicatedStore([Member(each, each) for each in (store, replica)])
    places = [
        place for place in verify_stores(manifest, written.manifest_key, both) if not place.key.startswith("refs/")
    ]
    assert [place.key for place in places] == [blob_key(form.blob)]
    assert list(repair(manifest, both, places)) == []
    assert replica.get(blob_key(form.blob)).data == store.get(blob_key(form.blob)).data


def test_the_last_look_sees_both_forms(machine, written, store):
    """A generation whose form went away before its ref moved is not published."""
    repository = Repository(store)
    assert new_blobs(written.manifest, None) == written.manifest.blobs
    assert new_blobs(written.manifest, written.manifest) == {}
    confirm(repository, written.manifest, written.manifest_key, replaced=None)
    store.delete(blob_key(written.manifest.forms[-1].blob))
    with pytest.raises(ObjectMissingError):
        confirm(repository, written.manifest, written.manifest_key, replaced=None)


def test_a_part_of_a_generation_has_the_forms_of_its_chunks(written):
    """Where a start needs only some segments, forms follow their chunks to new indices."""
    manifest = written.manifest
    first, *others = manifest.segments
    part = needed(manifest._replace(segments=(first._replace(consumer="program:x"), *others)))
    assert 0 < len(part.chunks) < len(manifest.chunks)
    blobs = {chunk.blob: form.blob for form in manifest.forms for chunk in [manifest.chunks[form.chunk]]}
    assert {part.chunks[form.chunk].blob: form.blob for form in part.forms} == {
        chunk.blob: blobs[chunk.blob] for chunk in part.chunks if chunk.blob in blobs
    }


# --- blocks of planes ---------------------------------------------------------------------------------------------------


def test_planes_that_a_gpu_decodes_are_in_shorter_blocks(machine, store):
    """Chunks of device memory are written in blocks of 64 KiB, those of the host in blocks of 256 KiB, on a CPU too."""
    import cupy

    model = {"device": cupy.asarray(weights(1_000_000)), "host": weights(1_000_000, 5)}
    manifest = write(captured(model), store, codec="planes+zstd").manifest
    found = {chunk.segment in manifest.host_segments: chunk.parameters["block_bytes"] for chunk in manifest.chunks}
    assert found == {False: 64 << 10, True: 256 << 10}
    assert landed(machine, manifest, store, verify_raw=True) == (raw(manifest, store), [])
    plain = write(capture_of({"host": weights(1_000_000)}), store, codec="planes+zstd").manifest
    assert {chunk.parameters["block_bytes"] for chunk in plain.chunks} == {256 << 10}
