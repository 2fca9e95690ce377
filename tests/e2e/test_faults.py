"""Faults of the machine and the store, in real processes: every start answers rightly, says what happened, leaves nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from coldstart.errors import StoreTransientError
from coldstart.stores.retrying import RetryPolicy
from tests.faulty_server import FINE, FLIP, RESET, STALL, Fault, FaultyServer, settings_of
from tests.faulty_start import Faults
from tests.starts import RUN_SECONDS, Project, Start, flip

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what is looked at is in Linux's /proc")

HANDLER = """
import os, resource, time
from pathlib import Path
import numpy as np
from blake3 import blake3
from coldstart import coldstart

HERE = Path(__file__).parent

def load(ctx):
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    seed = int((HERE / "seed.txt").read_text())
    weights = np.random.default_rng(seed).standard_normal(12 << 20, dtype=np.float32)
    table = np.frombuffer(np.random.default_rng(0).bytes(24 << 20), np.float32).copy()
    words = ctx.keep(HERE / "words.txt")
    return {"weights": (weights.view(np.uint32) >> 16).astype(np.uint16), "table": table, "words": len(words.read_text())}

@coldstart("faulty", load=load, warmup=[1], version="1")
def handler(event, model):
    if event["input"] == "hold" and (HERE / "held").exists():
        (HERE / "hold").touch()
        while (HERE / "held").exists():
            time.sleep(0.02)
    if os.environ.get("COLDSTART_START_RECORDS") == "off" and (HERE / "slow proof").exists():
        (HERE / "proving").touch()
        time.sleep(600)
    digest = blake3(model["weights"].view(np.uint8)).update(model["table"].view(np.uint8)).hexdigest()
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return [digest, model["words"], children] + ([arenas()] if event["input"] == "arenas" else [])

def arenas():
    found = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            found += "/memfd:coldstart" in os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # of another thread, and closed since
            pass
    return found
"""
"""24 MiB of bf16, 24 MiB that do not shrink and a kept file: 12 chunks and more, of two codecs. Answers tell of every byte."""

WORDS = "word " * (128 << 10)
MARK = "PROCESS_OF_A_TEST"
"""Variable that the processes of one start inherit."""
ENDED_SECONDS = 20.0
QUICK = 0.1
"""Patience for starts that are to run out of it: silence counts after 0.8 s, and a read is asked for again for 3 s."""
KILLED = "threads (the fetcher process ended early)"
UNSHARED = "threads (this system gives no memory that a fetcher process could share)"


class Generations:
    """A project with two generations, in a folder store without flat files. ``new`` and ``old``: their answers."""

    def __init__(self, project: Project) -> None:
        self.project = project
        project.write(HANDLER)
        project.write(WORDS, "words.txt")
        project.write("1", "seed.txt")
        self.old = project.run().output
        project.write("2", "seed.txt")
        second = project.run("--fresh")
        assert second.capture["published"], second.capture
        self.new = second.output
        shutil.rmtree(project.store / ".flat", ignore_errors=True)
        shutil.rmtree(project.folder / "files", ignore_errors=True)
        old, new = (set(json.loads(path.read_text())["chunks"]["blob"]) for path in project.objects("manifests"))
        sizes = {path.name: path.stat().st_size for path in project.objects("blobs")}
        self.own = max(new - old, key=sizes.__getitem__)
        """A large blob that only the second generation has, and one that both have."""
        self.shared = max(new & old, key=sizes.__getitem__)
        self.blobs = new


@pytest.fixture(scope="module")
def generations(tmp_path_factory: pytest.TempPathFactory) -> Generations:
    """Not to be changed; starts from them have folders for restored files of their own."""
    return Generations(Project(tmp_path_factory.mktemp("faulty")))


@pytest.fixture
def faulty(generations: Generations, tmp_path: Path) -> Project:
    """The project of ``generations``, whose starts write nothing to its store and files to a folder of the test."""
    project = Project(generations.project.folder)
    project.environment = {
        "COLDSTART_FILES_FOLDER": str(tmp_path / "files"),
        "COLDSTART_CAPTURE": "off",
        "COLDSTART_START_RECORDS": "off",
        "COLDSTART_LOG": "json",
    }
    return project


@pytest.fixture
def own_store(faulty: Project, tmp_path: Path) -> Project:
    """The project of ``generations`` with a copy of the store, which its starts may write to."""
    faulty.store = tmp_path / "store"
    shutil.copytree(faulty.folder / "store", faulty.store, copy_function=os.link)
    return faulty


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    folder = tmp_path / "tiny"
    folder.mkdir(mode=0o700)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m,mode=700", "tmpfs", str(folder)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


# --- processes ---------------------------------------------------------------------------------------------------------------


class Run:
    """``coldstart run --json`` with faults, begun; all its processes bear a mark."""

    def __init__(self, project: Project, *arguments: str, faults: Faults = Faults(), **environment: str) -> None:  # noqa: B008
        self.mark = uuid.uuid4().hex
        self.began = time.monotonic()
        self.process = project.popen(
            "-m",
            "tests.faulty_start",
            "run",
            "handler.py",
            "--json",
            *arguments,
            environment={MARK: self.mark, **faults.environment(), **environment},
            start_new_session=True,
        )

    def end(self) -> Start:
        """Wait for its end: it must succeed, and leave no process."""
        try:
            output, errors = self.process.communicate(timeout=RUN_SECONDS)
            assert self.process.returncode == 0, errors
            self.leaves_nothing()
        finally:
            self.kill_all()
        return Start(json.loads(output.splitlines()[-1]), 0, errors)

    def processes(self) -> dict[int, str]:
        """Its processes, zombies aside: id and command line."""
        return {pid: command for pid, command in map(self._look, filter(str.isdigit, os.listdir("/proc"))) if command}

    def fetchers(self) -> list[int]:
        """Its fetcher processes."""
        return [pid for pid, command in self.processes().items() if "coldstart.fetch.child" in command]

    def states(self, text: str) -> list[str]:
        """The states of its processes with ``text`` in their command lines, such as S, R or T."""
        return [_state(pid) for pid, command in self.processes().items() if text in command]

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until something is so, while it runs."""
        deadline = time.monotonic() + RUN_SECONDS
        while not condition():
            assert time.monotonic() < deadline, self.processes()
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.01)

    def is_killed_once(self, condition: Callable[[], bool]) -> None:
        """Kill the worker when something is so; all its other processes must end by themselves."""
        try:
            self.wait_until(condition)
            self.process.kill()
            self.process.wait()
            self.leaves_nothing()
        finally:
            self.kill_all()

    def leaves_nothing(self) -> None:
        """Its processes all end by themselves, soon."""
        deadline = time.monotonic() + ENDED_SECONDS
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not left

    def kill_all(self) -> None:
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.communicate()

    def _look(self, pid: str) -> tuple[int, str]:
        try:
            if f"{MARK}={self.mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return int(pid), Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has just ended, or is somebody else's
            pass
        return int(pid), ""


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:  # it has just ended
        return ""


@contextmanager
def held_events(folder: Path) -> Iterator[Path]:
    """Events "hold" last as long as the block does; the path that is there as soon as one is served."""
    held, hold = folder / "held", folder / "hold"
    held.touch()
    try:
        yield hold
    finally:
        held.unlink()
        hold.unlink(missing_ok=True)


def start(project: Project, *arguments: str, faults: Faults = Faults(), **environment: str) -> Start:  # noqa: B008
    """One start with faults, to its end; nothing temporary is left in the project's folders."""
    done = Run(project, *arguments, faults=faults, **environment).end()
    folders = {project.store, *(Path(project.variables(environment).get(name, "/nowhere")) for name in FOLDERS)}
    assert [path for folder in folders for path in folder.rglob(".tmp-*")] == []
    return done


FOLDERS = ("COLDSTART_FILES_FOLDER", "COLDSTART_CACHE")


ARENAS = ("--input", '"arenas"')
"""An event whose answer ends with the number of memory files that the worker has open."""


def kinds(done: Start) -> tuple[str, str, list[str]]:
    """How a start says it came about: kind, what it recovered by, engines."""
    return done.kind, done.record["recovered_by"], done.record["engines"]


def is_blob(key: str) -> bool:
    """Whether an object is a blob."""
    return key.startswith("blobs/")


# --- a fetcher that is killed --------------------------------------------------------------------------------------------------


def test_dead_before_its_first_word(generations: Generations, own_store: Project) -> None:
    """Fetchers that die at once cost a start from a bucket or a folder nothing: threads fetch, and it is said."""
    with FaultyServer(generations.project.store) as server:
        done = start(own_store, faults=Faults(dead_fetchers=True), **server.environment)
    assert kinds(done) == ("restored", "none", [KILLED])
    assert done.output == generations.new
    done = start(own_store, faults=Faults(dead_fetchers=True), COLDSTART_FETCH_ENGINE="process")
    assert kinds(done) == ("restored", "none", [KILLED])
    assert done.output == generations.new


class Killer:
    """A fault of a server: kills a fetcher of ``run`` when the GET of this number, from 1, of such keys comes."""

    def __init__(self, number: int, prefix: str) -> None:
        self.run: Run | None = None
        self.killed = 0
        self._number = number
        self._prefix = prefix

    def __call__(self, key: str, _: int) -> Fault:
        self._number -= key.startswith(self._prefix)
        if self._number == 0 and not self.killed and self.run is not None:
            self.killed = self.run.fetchers()[0]
            os.kill(self.killed, signal.SIGKILL)
        return FINE


@pytest.mark.parametrize(
    ("number", "prefix", "processes", "engine"),
    [
        (1, "refs/", 1, "process"),
        (1, "manifests/", 1, "process"),
        (4, "blobs/", 1, KILLED),
        (4, "blobs/", 3, KILLED),
    ],
    ids=["ref", "manifest", "blobs", "blobs of three"],
)
def test_killed_at_work(
    generations: Generations, faulty: Project, number: int, prefix: str, processes: int, engine: str
) -> None:
    """A fetcher that is killed while it looks up is replaced by another, and at the blobs by threads; the others end too."""
    killer = Killer(number, prefix)
    with FaultyServer(generations.project.store, killer) as server:
        killer.run = Run(
            faulty,
            faults=Faults(bytes_per_fetcher=1),
            COLDSTART_FETCH_PROCESSES=str(processes),
            **server.environment,
        )
        done = killer.run.end()
    assert killer.killed
    assert kinds(done) == ("restored", "none", [engine])
    assert (done.reason, done.output) == ("", generations.new)


def test_killed_at_work_on_a_folder(generations: Generations, own_store: Project) -> None:
    """Fetchers of a folder's blobs that are killed in the middle are replaced by threads."""
    for processes in ("1", "3"):
        done = start(
            own_store,
            faults=Faults(killed_at_read=3, bytes_per_fetcher=1),
            COLDSTART_FETCH_ENGINE="process",
            COLDSTART_FETCH_PROCESSES=processes,
        )
        assert kinds(done) == ("restored", "none", [KILLED])
        assert done.output == generations.new
        shutil.rmtree(own_store.store / ".flat")


# --- a server in trouble ------------------------------------------------------------------------------------------------------


def test_one_silent_connection(generations: Generations, faulty: Project) -> None:
    """A connection that falls silent in the middle of a blob is overtaken by a second request, before it is given up."""
    overtaken: list[bool] = []

    def fault(key: str, before: int) -> Fault:
        if not key.endswith(generations.own):
            return FINE
        overtaken.append(before == 1 and server.waits_for_stalled())
        return FINE if before else STALL

    with FaultyServer(generations.project.store, fault) as server:
        done = start(faulty, **server.environment)
    assert overtaken == [False, True]
    assert kinds(done) == ("restored", "none", ["process"])
    assert (done.reason, done.output) == ("", generations.new)


@pytest.mark.parametrize("prefix", ["refs/faulty/", "manifests/", "blobs/"])
def test_server_that_stalls_for_ever(generations: Generations, faulty: Project, prefix: str) -> None:
    """A store that never finishes an answer is a labelled fallback once every request was repeated; nobody asks on."""

    def fault(key: str, _: int) -> Fault:
        return STALL if key.startswith(prefix) else FINE

    with FaultyServer(generations.project.store, fault) as server:
        done = start(faulty, faults=Faults(patience=QUICK, stalled_seconds=2.0), **server.environment)
        asked = Counter(key for key in server.asked if not is_blob(key))
    assert (done.kind, done.output) == ("fallback", generations.new)
    assert done.reason.count(StoreTransientError.__name__) == 1
    assert max(asked.values()) <= RetryPolicy().attempts  # by the fetcher, and then by nobody else
    assert len(asked) == (1 if prefix.startswith("refs/") else 2)  # the generation before would stall like this one
    assert done.record["ready_seconds"] < 60.0 * QUICK + 10.0


def test_server_that_is_not_there(generations: Generations, faulty: Project) -> None:
    """A store that refuses connections is a labelled fallback."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    done = start(faulty, faults=Faults(patience=QUICK), **settings_of(port))
    assert (done.kind, done.output) == ("fallback", generations.new)
    assert done.reason.startswith(StoreTransientError.__name__)


def test_server_that_errs_now_and_then(generations: Generations, faulty: Project) -> None:
    """Refusals for load at first, and connections reset in the middle of every third blob, are asked again: restored."""
    met: set[str] = set()

    def fault(key: str, before: int) -> Fault:
        if not before and not is_blob(key):
            return Fault(status=503)
        met.add(key)
        return RESET if is_blob(key) and not before and len(met) % 3 == 0 else FINE

    with FaultyServer(generations.project.store, fault) as server:
        done = start(faulty, **server.environment)
        asked = server.blobs_asked()
    assert set(asked) == generations.blobs
    assert len(asked) >= len(generations.blobs) + len(generations.blobs) // 3 - 1
    assert kinds(done) == ("restored", "none", ["process"])
    assert (done.reason, done.output) == ("", generations.new)


def test_blob_altered_on_its_way(generations: Generations, faulty: Project) -> None:
    """A byte that is altered once is repaired by the second read of that chunk alone."""

    def fault(key: str, before: int) -> Fault:
        return FLIP if key.endswith((generations.own, generations.shared)) and not before else FINE

    with FaultyServer(generations.project.store, fault) as server:
        done = start(faulty, **server.environment)
        asked = len(server.blobs_asked()) - len(generations.blobs)
        assert 2 <= asked <= 4  # a late answer may be asked for twice on a busy machine
    assert kinds(done) == ("restored", "chunk_retry", ["process"])
    assert (done.reason, done.output) == ("", generations.new)


@pytest.mark.parametrize(
    ("wrong", "error"), [(Fault(status=404), "ObjectMissingError"), (FLIP, "BlobCorruptError")], ids=["gone", "altered"]
)
def test_blob_that_stays_wrong(generations: Generations, faulty: Project, wrong: Fault, error: str) -> None:
    """A blob of the newest generation that is gone or altered leads to the previous one; of both, to load: it is named."""

    def faults_of(blob: str) -> Any:
        return lambda key, _: wrong if key.endswith(blob) else FINE

    with FaultyServer(generations.project.store, faults_of(generations.own)) as server:
        done = start(faulty, **server.environment)
        assert (done.capture["reason"], server.written) == ("captures are switched off", [])
    assert kinds(done) == ("restored", "previous_generation", ["process"])
    assert (done.record["generation"], done.output) == (1, generations.old)
    assert done.reason.startswith(f"{error}: ")
    assert generations.own in done.reason
    faulty.environment["COLDSTART_FILES_FOLDER"] += "-of-another-host"  # without its notes about the current generation
    with FaultyServer(generations.project.store, faults_of(generations.shared)) as server:
        done = start(faulty, *ARENAS, **server.environment)
    assert (done.kind, done.output) == ("fallback", [*generations.new, 0])
    assert done.reason.count(f"{error}: ") == 2
    assert generations.shared in done.reason


# --- a full disk ---------------------------------------------------------------------------------------------------------------


def lines(done: Start, event: str) -> list[dict[str, Any]]:
    """The log lines of an event."""
    found = [json.loads(line) for line in done.errors.splitlines() if line.startswith("{")]
    return [line for line in found if line["event"] == event]


def test_cache_on_a_full_disk(generations: Generations, faulty: Project, tiny_disk: Path) -> None:
    """A cache whose disk is full takes what fits, says once that it takes no more, and the start is restored."""
    with FaultyServer(generations.project.store) as server:
        done = start(faulty, COLDSTART_CACHE=str(tiny_disk), **server.environment)
        assert set(server.blobs_asked()) == generations.blobs
    assert kinds(done) == ("restored", "none", ["process"])
    assert (done.reason, done.output) == ("", generations.new)
    told = [line["reason"] for line in lines(done, "store_degraded")]
    assert sum("takes no more copies" in reason for reason in told) == 1, told
    assert any((tiny_disk / "v1" / "blobs").iterdir())


def test_restored_files_on_a_full_disk(generations: Generations, own_store: Project, tiny_disk: Path) -> None:
    """A folder for restored files without room is a labelled fallback, and keeps no half file."""
    (tiny_disk / "other").write_bytes(bytes((16 << 20) - len(WORDS) // 2))
    done = start(own_store, COLDSTART_FILES_FOLDER=str(tiny_disk))
    assert (done.kind, done.output) == ("fallback", generations.new)
    assert "No space left on device" in done.reason
    assert "COLDSTART_FILES_FOLDER" in done.reason
    assert not list(tiny_disk.rglob("words.txt"))


def test_store_on_a_full_disk(generations: Generations, faulty: Project, tiny_disk: Path) -> None:
    """A capture for which the store has no room says so, and takes nothing from the answers; nothing becomes current."""
    store = tiny_disk / "store"
    faulty.store = store
    done = start(faulty, "--repeat", "3", COLDSTART_CAPTURE="on")
    assert (done.kind, done.output, done.document["answers_equal"]) == ("cold", generations.new, True)
    assert not done.capture["published"]
    assert "the disk is full" in done.capture["reason"]
    assert not (store / "refs").exists()


# --- out of memory ---------------------------------------------------------------------------------------------------------------


def test_too_little_memory(generations: Generations, own_store: Project) -> None:
    """Where the snapshot's memory, or that for fetching it, is refused, the start loads and says why."""
    with FaultyServer(generations.project.store) as server:
        for faults, reason in (
            (Faults(data_bytes=40 << 20), "DeviceError: "),
            (Faults(data_bytes=120 << 20), "too little memory for fetching"),
            (Faults(control_group_bytes=80 << 20), "give the worker more memory"),
        ):
            for environment in (server.environment, {"COLDSTART_FETCH_ENGINE": "process"}):
                done = start(own_store, faults=faults, **environment)
                assert (done.kind, done.output) == ("fallback", generations.new)
                assert reason in done.reason


def test_no_memory_files(generations: Generations, own_store: Project) -> None:
    """Where no memory file can be had, threads fetch into memory of the process, and the record says so."""
    with FaultyServer(generations.project.store) as server:
        for environment in (server.environment, {"COLDSTART_FETCH_ENGINE": "process"}):
            done = start(own_store, faults=Faults(no_memory_files=True), **environment)
            assert kinds(done) == ("restored", "none", [UNSHARED])
            assert done.output == generations.new


# --- a worker that is killed -----------------------------------------------------------------------------------------------------


def test_worker_killed_while_it_fetches(generations: Generations, faulty: Project) -> None:
    """The fetchers of a worker that is killed end by themselves."""
    with FaultyServer(generations.project.store, lambda key, _: STALL if is_blob(key) else FINE) as server:
        run = Run(faulty, faults=Faults(bytes_per_fetcher=1), COLDSTART_FETCH_PROCESSES="3", **server.environment)
        run.is_killed_once(lambda: len(run.fetchers()) == 3 and bool(server.blobs_asked()))


def test_worker_killed_while_it_captures(faulty: Project, tmp_path: Path) -> None:
    """A saver that stands still for an event, and a proof, end when their worker is killed; nothing becomes current."""
    faulty.store = tmp_path / "store"
    with held_events(faulty.folder) as hold:
        run = Run(faulty, "--input", '"hold"', COLDSTART_CAPTURE="on", COLDSTART_START_RECORDS="on")
        run.is_killed_once(lambda: hold.exists() and "T" in run.states("coldstart.save.child"))
    (faulty.folder / "slow proof").touch()
    try:
        run = Run(faulty, COLDSTART_CAPTURE="on", COLDSTART_START_RECORDS="on")
        run.is_killed_once((faulty.folder / "proving").exists)
    finally:
        (faulty.folder / "slow proof").unlink()
    assert not list((faulty.store / "refs").rglob("*"))


# --- copies of this host -----------------------------------------------------------------------------------------------------------


def test_two_workers_with_one_cache(generations: Generations, faulty: Project, tmp_path: Path) -> None:
    """Two that start at once fetch every blob once; one that maps what they kept goes on when the cache is deleted."""
    cache = tmp_path / "cache"
    with FaultyServer(generations.project.store) as server:
        environment = {"COLDSTART_CACHE": str(cache), **server.environment}
        for done in [run.end() for run in [Run(faulty, **environment) for _ in range(2)]]:
            assert kinds(done) == ("restored", "none", ["process"])
            assert done.output == generations.new
        assert sorted(server.blobs_asked()) == sorted(generations.blobs)
        with held_events(faulty.folder) as hold:
            run = Run(faulty, "--input", '"hold"', **environment)
            run.wait_until(hold.exists)
            shutil.rmtree(cache)
        done = run.end()
        assert sorted(server.blobs_asked()) == sorted(generations.blobs)
    assert kinds(done) == ("restored", "none", ["mapped"])
    assert done.output == generations.new


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip, _truncate])
def test_damaged_flat_file(generations: Generations, own_store: Project, damage: Any) -> None:
    """A flat file that was altered or cut off since is noticed: the start fetches, answers rightly, and mends it."""
    assert start(own_store).output == generations.new
    assert start(own_store).record["engines"] == ["mapped"]
    damage(max((own_store.store / ".flat/v1/segments").iterdir(), key=lambda path: path.stat().st_size))
    done = start(own_store)
    assert (done.kind, done.reason, done.output) == ("restored", "", generations.new)
    assert done.record["engines"] != ["mapped"]
    assert start(own_store).record["engines"] == ["mapped"]
