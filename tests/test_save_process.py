"""The saver process: what it stores, what it costs, how it ends, and who does its work when it does not."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import numpy as np
import pytest

from coldstart.capture import Encoding, Writing, write_generation
from coldstart.errors import CaptureError, StateChangedError, StoreError
from coldstart.fetch import Address
from coldstart.manifest import blob_key
from coldstart.repository import COLLECTION_GRACE_SECONDS, Repository
from coldstart.save import AUTO, PROCESS, THREADS, Saving
from coldstart.save import process as engine
from coldstart.save.turns import Turns
from coldstart.stores import StoreOptions, open_store
from coldstart.stores.memory import MemoryStore
from tests.generations import KEY, OTHER_KEY, AtPace, assert_same, capture_of, file_bytes, restored, sources
from tests.starts import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the saver process is for Linux")

MIB = 1 << 20
PATIENCE_SECONDS = 60.0
ENDED_EARLY = "threads (the saver process ended early)"


@pytest.fixture
def address(tmp_path):
    """A store in a folder."""
    return Address(f"file://{tmp_path / 'store'}", StoreOptions())


def saving(address, engine=PROCESS, *, budget_bytes=64 * MIB, bytes_per_second=0):
    """How a test saves: by a process of its own, unless it says otherwise."""
    return Saving(engine, address, budget_bytes, bytes_per_second)


class Written:
    """A generation written by a saver process, and what was seen of it."""

    def __init__(self, capture, address, *, codec="auto", pace=lambda: None, stopping=None, **options):
        self.repository = Repository(open_store(*address))
        self.writing = Writing(
            capture,
            self.repository,
            encoding=Encoding(codec, 1),
            saving=saving(address, **options),
            stopping=stopping,
        )
        self.saver = self.writing.saver
        self._pace = pace

    @property
    def pid(self):
        return self.saver._pid

    def write(self):
        try:
            return self.writing.write(self._pace)
        finally:
            self.saver.end()


def state_of(seed=0, *, megabytes=12):
    """Numbers that compress like weights, tiny arrays, and arrays of which several share a chunk."""
    random = np.random.default_rng(seed)
    return {
        "w": random.standard_normal(megabytes * MIB // 4).astype(np.float32),
        "half": (random.standard_normal(3 * MIB) * 0.02).astype(np.float16),
        "several": [random.integers(0, 5, MIB + 3, dtype=np.uint8) for _ in range(3)],
        "norms": [np.full(33, number, np.float32) for number in range(2000)],
        "equal": np.ones(8 * MIB, np.uint8),
    }


def is_gone(pid):
    """Whether a process ends soon."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


# --- what is stored ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["auto", "raw", "zstd", "planes+zstd"])
def test_it_stores_what_a_thread_would(tmp_path, codec):
    """Chunk by chunk the manifest is the one that the capturing thread writes, and the state comes back from it."""
    state, manifests = state_of(), []
    (tmp_path / "data.bin").write_bytes(os.urandom(5 * MIB + 1))
    for name in (PROCESS, THREADS):
        address = Address(f"file://{tmp_path / name}", StoreOptions())
        made = Written(
            capture_of(state, files=sources({"data.bin": tmp_path / "data.bin"})), address, codec=codec, engine=name
        )
        written = made.write()
        assert made.saver.engine == name
        stored_bytes = sum(chunk.stored_bytes for chunk in written.manifest.chunks)
        assert written.written_bytes == written.manifest.stored_bytes
        assert written.reused_bytes == stored_bytes - written.written_bytes, "equal chunks are sent once"
        store = open_store(*address)
        assert_same(restored(written.manifest, store), state)
        assert len(file_bytes(written.manifest, store)["kept/data.bin"]) == 5 * MIB + 1
        manifests.append(written.manifest)
    assert manifests[0].chunks == manifests[1].chunks
    assert manifests[0].segments == manifests[1].segments


def test_what_the_parent_has_is_not_sent(address):
    """An unchanged state writes no blob, a changed array only its own chunks."""
    state = state_of()
    first = Written(capture_of(state), address).write()
    again = Written(capture_of(state, follows=first), address).write()
    assert (again.written_bytes, again.manifest.chunks) == (0, first.manifest.chunks)
    state["half"][7] = 1
    changed = Written(capture_of(state, follows=again), address).write()
    differing = [chunk for chunk in changed.manifest.chunks if chunk not in first.manifest.chunks]
    assert len(differing) == 1
    assert changed.written_bytes == differing[0].stored_bytes
    assert_same(restored(changed.manifest, open_store(*address)), state)


def test_a_parent_of_another_key_is_relied_on_while_young(address, tmp_path):
    """Blobs of a parent that nobody replaces are looked at, and what is gone or old is written again."""
    first = Written(capture_of(state_of()), address).write()
    gone, old = first.manifest.chunks[1], first.manifest.chunks[2]
    store = open_store(*address)
    store.delete(blob_key(gone.blob))
    past = time.time() - COLLECTION_GRACE_SECONDS
    os.utime(tmp_path / "store" / blob_key(old.blob), (past, past))
    second = Written(capture_of(state_of(), follows=first, key=OTHER_KEY, generation=1), address).write()
    assert second.written_bytes == gone.stored_bytes + old.stored_bytes
    assert_same(restored(second.manifest, store), state_of())


def test_a_capture_that_mends_writes_every_blob(address, tmp_path):
    """Blobs that were found damaged are replaced, whatever lies under their names."""
    first = Written(capture_of(state_of()), address).write()
    for chunk in first.manifest.chunks:
        (tmp_path / "store" / blob_key(chunk.blob)).write_bytes(bytes(chunk.stored_bytes))
    second = Written(capture_of(state_of(), follows=first, mends=True), address).write()
    assert second.written_bytes == second.manifest.stored_bytes
    assert_same(restored(second.manifest, open_store(*address)), state_of())


def test_an_interrupted_capture_goes_on(address, tmp_path):
    """What the saver stored before its capture broke off is not sent again."""

    class Stop(Exception):
        pass

    def stop():
        raise Stop

    with pytest.raises(Stop):
        Written(capture_of(state_of(megabytes=64)), address, pace=AtPace(18, stop)).write()
    there = sum(info.size_bytes for info in open_store(*address).list("blobs/"))
    assert there > 0
    assert not (tmp_path / "store" / "manifests").exists()
    again = Written(capture_of(state_of(megabytes=64)), address).write()
    assert again.reused_bytes >= there
    assert again.written_bytes + there == again.manifest.stored_bytes


def test_weights_that_change_meanwhile_drop_the_generation(address):
    """A write after a chunk was copied is noticed before the manifest is written."""
    state = state_of()
    with pytest.raises(StateChangedError, match="changed while they were copied"):
        Written(capture_of(state), address, pace=AtPace(5, lambda: state["w"].__setitem__(0, 1e9))).write()
    assert list(open_store(*address).list("manifests/")) == []


def test_a_torn_copy_of_what_may_change_is_noticed(address, monkeypatch):
    """A buffer that is declared to change, and does between its hash and its copy, drops the generation at once."""
    state = {"cache": np.zeros(9 * MIB, np.uint8)}
    hash_as_ever = engine.hash_of
    monkeypatch.setattr(engine, "hash_of", lambda data: (hash_as_ever(data), state["cache"].__iadd__(1))[0])
    with pytest.raises(StateChangedError):
        Written(capture_of(state, kinds={'["cache"]': "other"}), address).write()


def test_buffers_that_are_declared_to_change_may(address):
    """Between the chunks a declared buffer may change: each of its chunks is of one moment."""
    state = {"cache": np.zeros(100, np.int64), "w": np.zeros(9 * MIB, np.uint8)}
    pace = lambda: state["cache"].__iadd__(1)  # noqa: E731
    written = Written(capture_of(state, kinds={'["cache"]': "other"}), address, pace=pace).write()
    assert len(set(restored(written.manifest, open_store(*address))["cache"].tolist())) == 1


def test_manifest_and_ref_are_written_through_it(address):
    """Publishing works as ever: the first one wins, the second is told so, and both through the saver."""
    repository = Repository(open_store(*address))
    before = repository.look_up("model", KEY)
    first, second = (Written(capture_of({"w": np.full(MIB, n, np.uint8)}), address) for n in range(2))
    try:
        written = [made.writing.write(lambda: None) for made in (first, second)]
        first.saver.repository.publish(written[0].manifest, written[0].manifest_key, replaces=before)
        with pytest.raises(StateChangedError, match="another worker published"):
            second.saver.repository.publish(written[1].manifest, written[1].manifest_key, replaces=before)
        assert (first.saver.engine, second.saver.engine) == (PROCESS, PROCESS)
        ref = repository.look_up("model", KEY).ref
        assert ref is not None
        assert ref.manifest == written[0].manifest_key
    finally:
        first.saver.end()
        second.saver.end()


S3_WORKER = """
import os, sys
import numpy as np
from coldstart.capture import Encoding, Writing
from coldstart.fetch import Address
from coldstart.manifest import KeyRecord
from coldstart.repository import Repository
from coldstart.save import Saving
from coldstart.stores import StoreOptions, open_store
from tests.generations import KEY, capture_of

address = Address(sys.argv[1], StoreOptions(sys.argv[2], "us-east-1", "id", "secret"))
repository = Repository(open_store(*address))
before = repository.look_up("model", KEY)
writing = Writing(
    capture_of({"w": np.arange(3 << 20)}), repository, encoding=Encoding("auto", 1), saving=Saving("auto", address, 64 << 20, 0)
)
written = writing.write(lambda: None)
writing.saver.repository.publish(written.manifest, written.manifest_key, replaces=before)
writing.saver.end()
assert repository.look_up("model", KEY).ref.generation == 1
print(writing.saver.engine, sorted({"boto3", "botocore"} & set(sys.modules)))
"""


def test_the_worker_imports_no_client_of_a_bucket(s3_endpoint, s3_bucket, s3_options):
    """A whole generation goes into a bucket and becomes current, and boto3 is imported by the saver alone."""
    url = f"s3://{s3_bucket}/prefix"
    done = subprocess.run(
        [sys.executable, "-c", S3_WORKER, url, s3_endpoint],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        cwd=ROOT,
        check=False,
    )
    assert done.stdout == "process []\n", done.stderr
    store = open_store(url, s3_options)
    ref = Repository(store).look_up("model", KEY).ref
    assert ref is not None
    manifest = Repository(store).manifest(ref.manifest, name="model")
    assert np.array_equal(restored(manifest, store)["w"], np.arange(3 << 20))


# --- which engine --------------------------------------------------------------------------------------------------------


def test_auto_takes_the_process_where_it_pays(address):
    """A small state in a folder is not worth a process; a large one is."""
    found = []
    for length_bytes in (MIB, 9 * MIB):
        made = Written(capture_of({"w": np.zeros(length_bytes, np.uint8)}), address, engine=AUTO)
        made.write()
        found.append(made.saver.engine)
    assert found == [THREADS, PROCESS]


@pytest.mark.parametrize("engine_", [AUTO, PROCESS])
def test_a_store_of_this_process_is_written_by_it(engine_):
    """Another process cannot see a store in memory."""
    store = MemoryStore.shared("saver")
    address = Address("memory://saver", StoreOptions())
    writing = Writing(
        capture_of(state_of()), Repository(store), encoding=Encoding("auto", 1), saving=saving(address, engine_)
    )
    assert writing.saver.engine == THREADS
    writing.write(lambda: None)


def test_without_memory_files_the_thread_does_it_and_says_why(address, monkeypatch):
    """A platform that cannot share memory is no obstacle."""
    monkeypatch.delattr(os, "memfd_create")
    made = Written(capture_of(state_of()), address)
    assert_same(restored(made.write().manifest, open_store(*address)), state_of())
    assert made.saver.engine == "threads (this platform has no saver process)"


def test_an_interpreter_that_cannot_be_started(address, monkeypatch):
    """Where the process cannot be spawned the thread does it, says why, and no descriptor is left."""
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    before = len(os.listdir("/proc/self/fd"))
    made = Written(capture_of(state_of()), address)
    written = made.write()
    assert len(os.listdir("/proc/self/fd")) == before
    assert made.saver.engine.startswith("threads (the saver process could not be started: No such file")
    assert_same(restored(written.manifest, open_store(*address)), state_of())


# --- what it costs -------------------------------------------------------------------------------------------------------


def test_it_runs_where_nobody_else_wants_to(address):
    """Once it works the saver has the policy of the idle, and this process the one that it had."""
    policies = []
    made = Written(
        capture_of(state_of()),
        address,
        pace=AtPace(8, lambda: policies.append(os.sched_getscheduler(made.pid))),
    )
    made.write()
    assert policies == [os.SCHED_IDLE]
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


@pytest.mark.parametrize(
    ("budget", "slots"), [(16 * MIB, 1), (32 * MIB, 2), (64 * MIB, 4), (256 * MIB, 16), (1024 * MIB, 16)]
)
def test_slots_keep_to_their_part_of_the_budget(address, budget, slots):
    """The memory file has a quarter of the budget at most, and one slot at least: many for small chunks, few for large ones."""
    made = Written(capture_of(state_of()), address, budget_bytes=budget)
    try:
        largest = max(extent.length_bytes for extent in made.writing._layout.chunks)
        assert largest == 4 * MIB
        assert os.fstat(made.saver._ring).st_size == slots * largest
    finally:
        made.saver.end()


def test_the_memory_of_the_saver_is_bounded(address):
    """Of a state several times the budget, the saver never holds more than the budget, its interpreter included."""
    peaks = []

    def look():
        with open(f"/proc/{made.pid}/status") as file:
            peaks.extend(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))

    state = {"w": np.random.default_rng(0).standard_normal(64 * MIB).astype(np.float32)}
    made = Written(capture_of(state), address, budget_bytes=112 * MIB, codec="planes+zstd", pace=look)
    made.write()
    assert max(peaks) < 112 * MIB < sum(array.nbytes for array in state.values()) / 2


def test_a_rate_limit_reaches_the_saver(address):
    """With a limit the blobs take their time: all but the first wait for those before them."""
    began = time.monotonic()
    written = Written(capture_of({"w": np.arange(3 * MIB)}), address, codec="raw", bytes_per_second=40 * MIB).write()
    first_bytes = max(chunk.stored_bytes for chunk in written.manifest.chunks)
    assert time.monotonic() - began >= (written.written_bytes - first_bytes) / (40 * MIB)


# --- how it ends ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [0.0, 0.2, 0.45, 0.5, 0.7, 0.99])
def test_a_killed_saver_is_replaced_by_the_thread(address, part):
    """Killed at any chunk, while they are saved or looked at again: the generation is whole, and it is told who made it."""
    made = Written(capture_of(state_of()), address)
    calls = 2 * len(made.writing._layout.chunks)
    made._pace = AtPace(int(part * calls), lambda: os.kill(made.pid, signal.SIGKILL))
    written = made.write()
    assert made._pace.calls == calls
    assert made.saver.engine == ENDED_EARLY
    assert_same(restored(written.manifest, open_store(*address)), state_of())
    assert written.manifest.stored_bytes <= written.written_bytes + written.reused_bytes


def test_a_saver_killed_before_the_ref_is_moved(address):
    """What is left to be written is written by this process."""
    made = Written(capture_of(state_of()), address)
    try:
        written = made.writing.write(lambda: None)
        os.kill(made.pid, signal.SIGKILL)
        lookup = made.repository.look_up("model", KEY)
        made.saver.repository.publish(written.manifest, written.manifest_key, replaces=lookup)
        assert made.saver.engine == ENDED_EARLY
        assert made.repository.look_up("model", KEY).ref is not None
    finally:
        made.saver.end()


def test_a_store_that_refuses_is_told(address, tmp_path):
    """The saver's error is raised here as the class that it is, and nothing is published."""
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "blobs").write_text("not a folder")
    with pytest.raises(StoreError, match="blobs"):
        Written(capture_of(state_of()), address).write()
    assert list(open_store(*address).list("manifests/")) == []


def test_an_address_that_the_saver_cannot_open(address):
    """A store that cannot even be opened there ends the capture with that reason."""
    repository = Repository(open_store(*address))
    bad = Address("s3://bucket/prefix", StoreOptions(access_key_id="only half of a pair"))
    with pytest.raises(StoreError):
        write_generation(
            capture_of(state_of()), repository, encoding=Encoding("raw", 1), pace=lambda: None, saving=saving(bad)
        )


def test_a_disk_that_fills_up(tmp_path):
    """A full disk ends the capture with a reason that says so, and requests of this process never notice."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this user may not mount a small disk")
    try:
        address = Address(f"file://{folder}/store", StoreOptions())
        with pytest.raises(StoreError, match="disk is full"):
            Written(capture_of(state_of()), address, codec="raw").write()
        assert list(open_store(*address).list("manifests/")) == []
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_saver_without_memory_is_replaced(address):
    """An error that nobody foresaw ends the saver; the thread does its work or says what is wrong."""
    made = Written(capture_of(state_of()), address, pace=AtPace(0, lambda: None))
    resource.prlimit(made.pid, resource.RLIMIT_AS, (1 << 20, 1 << 20))
    written = made.write()
    assert made.saver.engine == ENDED_EARLY
    assert_same(restored(written.manifest, open_store(*address)), state_of())


@pytest.mark.parametrize("call", [0, 5, 12])
def test_stopped_it_begins_no_further_chunk(address, call):
    """Told to stop, whoever captures is told so, and the saver is gone afterwards."""
    stopping = threading.Event()

    def stop():
        stopping.set()
        made.saver.stop()

    made = Written(capture_of(state_of()), address, pace=AtPace(call, stop), stopping=stopping)
    with pytest.raises(CaptureError, match="the worker ended"):
        made.write()
    assert is_gone(made.pid)
    assert list(open_store(*address).list("manifests/")) == []


def test_stopped_while_it_waits_for_a_slot(address):
    """A capture that waits for a slow store wakes up when it is stopped, and the put under way gets its time."""
    stopping = threading.Event()
    made = Written(
        capture_of({"w": np.arange(8 * MIB)}),
        address,
        codec="raw",
        stopping=stopping,
        budget_bytes=16 * MIB,
        bytes_per_second=MIB,
    )
    raised = []

    def write():
        try:
            made.writing.write(lambda: None)
        except CaptureError as error:
            raised.append(error)
        made.saver.end(PATIENCE_SECONDS)  # returns when the saver has done what was under way

    thread = threading.Thread(target=write)
    thread.start()
    while not list(open_store(*address).list("blobs/")):
        time.sleep(0.01)
    stopping.set()
    made.saver.stop()
    thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive()
    assert "the worker ended" in str(raised[0])
    assert is_gone(made.pid)
    assert len(list(open_store(*address).list("blobs/"))) < len(made.writing._layout.chunks)


def test_an_end_leaves_nothing(address):
    """Neither process nor descriptor nor thread is left, however often it is told to end."""
    before = len(os.listdir("/proc/self/fd"))
    made = Written(capture_of(state_of()), address)
    made.write()
    made.saver.end()
    assert is_gone(made.pid)
    assert len(os.listdir("/proc/self/fd")) == before
    assert not any(thread.name == "coldstart-saver" for thread in threading.enumerate())


ORPHAN = """
import os, sys
import numpy as np
from coldstart.capture import Encoding, Writing
from coldstart.fetch import Address
from coldstart.repository import Repository
from coldstart.save import Saving
from coldstart.stores import StoreOptions, open_store
from tests.generations import capture_of

address = Address(sys.argv[1], StoreOptions())
writing = Writing(
    capture_of({"w": np.zeros(1 << 20)}), Repository(open_store(*address)), encoding=Encoding("raw", 1),
    saving=Saving("process", address, 64 << 20, 0),
)
writing.write(lambda: None)
if sys.argv[2] == "forked" and os.fork() == 0:
    import time
    time.sleep(3600)
print(writing.saver._pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("kind", ["alone", "forked"])
def test_it_does_not_outlive_its_worker(address, kind):
    """A worker that is killed takes its saver along, even if a child that it forked holds the other end of the wire."""
    worker = subprocess.Popen(
        [sys.executable, "-c", ORPHAN, address.url, kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        pid = int(worker.stdout.readline())
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait(PATIENCE_SECONDS)
        assert is_gone(pid)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
        worker.wait(PATIENCE_SECONDS)
        worker.stdin.close()
        worker.stdout.close()


# --- turns ---------------------------------------------------------------------------------------------------------------


def state_letter(pid):
    """What the kernel says a process is doing: ``T`` is stopped."""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def wait_for_state(pid, letters):
    """Wait until a process is in one of these states."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (found := state_letter(pid)) not in letters:
        assert time.monotonic() < deadline, found
        time.sleep(0.001)


def test_while_an_event_is_served_it_stands_still(address):
    """A process that is given turns is stopped while an event is served, goes on after it, and is left running."""
    served, over = threading.Event(), threading.Event()

    def idle(_):
        served.set()
        over.wait(PATIENCE_SECONDS)

    made = Written(capture_of(state_of()), address)
    try:
        turns = Turns(made.saver.group, idle)
        assert served.wait(PATIENCE_SECONDS)
        wait_for_state(made.pid, "T")
        over.set()
        written = made.writing.write(lambda: None)
        turns.end()
        assert state_letter(made.pid) != "T"
        assert_same(restored(written.manifest, open_store(*address)), state_of())
    finally:
        made.saver.end()


def test_a_process_that_is_gone_ends_its_turns(address):
    """The saver may be killed while it has turns: whoever gives them stops, without an error."""
    made = Written(capture_of(state_of()), address)
    turns = Turns(made.saver.group, lambda _: None)
    made.saver.end()
    turns.end()
    assert not any(thread.name == "coldstart-turns" for thread in threading.enumerate())


STOPPED_ORPHAN = ORPHAN.replace(
    "print(writing.saver._pid, flush=True)",
    "import signal\nos.killpg(writing.saver.group, signal.SIGSTOP)\nprint(writing.saver._pid, flush=True)",
)


def test_a_stopped_saver_does_not_outlive_its_worker(address):
    """A worker that is killed while its saver stands still takes it along."""
    worker = subprocess.Popen(
        [sys.executable, "-c", STOPPED_ORPHAN, address.url, "alone"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    pid = int(worker.stdout.readline())
    try:
        wait_for_state(pid, "T")
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait(PATIENCE_SECONDS)
        assert is_gone(pid)
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        worker.kill()
        worker.wait(PATIENCE_SECONDS)
        worker.stdin.close()
        worker.stdout.close()
