"""Hibernating and waking pods: nothing is terminated before every byte is verified, nor in any doubt."""

from __future__ import annotations

import json
import threading
import time
from datetime import UTC, datetime

import pytest

from coldstart.cli import hibernate as hibernate_command
from coldstart.cli import main
from coldstart.config import load
from coldstart.deploy import hibernation
from coldstart.deploy.hibernation import Hibernator, Waker
from coldstart.deploy.pods import body_of, outlives, pod_of, read_record, record_of
from coldstart.deploy.rest import RestClient
from coldstart.errors import (
    ColdstartError,
    ConflictError,
    CredentialsError,
    DeployError,
    PlatformBusyError,
    ResourceMissingError,
    SnapshotError,
    UsageError,
)
from coldstart.manifest import manifest_key
from coldstart.repository import Repository
from coldstart.stores.local import LocalStore
from tests.manage_plane import API_KEY, ManagePlane
from tests.starts import SCALES, Project, flip

POLL_SECONDS = 0.01
LONG_SECONDS = 60.0
SECRET = "hf_0123456789secret"
GPU = "NVIDIA GeForce RTX 4090"
PARTS = """
import numpy as np
from coldstart import coldstart

def first(): return {"x": np.arange(64, dtype=np.float32)}
def second(): return {"y": np.ones(64, np.float32)}

@coldstart("parts", load={"first": first, "second": second}, warmup=[1])
def handler(event, model): return float(model["first"]["x"].sum() + model["second"]["y"].sum())
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A project whose worker has started once and made its snapshot, and one with a state of two parts."""
    project = Project(tmp_path_factory.mktemp("made"))
    project.write(SCALES)
    project.run()
    project.write(PARTS, "parts.py")
    project.run(target="parts.py")
    return project


@pytest.fixture
def project(made, tmp_path, monkeypatch):
    """A copy of it, whose store is the configured one."""
    copy = made.copy(tmp_path / "copy")
    monkeypatch.setenv("COLDSTART_STORE", f"file://{copy.store}")
    return copy


@pytest.fixture
def plane(project, monkeypatch):
    """A management API with a running pod, pod1, that started before the worker and has the store on its volume."""
    with ManagePlane() as api:
        api.pods["pod1"] = pod(project)
        api.templates["tpl1"] = {"id": "tpl1", "name": "t", "image": "me/scales:1", "serverless": False, "env": {}}
        monkeypatch.setenv("RUNPOD_API_BASE_URL", api.url)
        monkeypatch.setenv("RUNPOD_API_KEY", API_KEY)
        yield api


def pod(project, *, age_seconds=3600.0, env=None, **changes):
    """A pod as the management API has it."""
    started = datetime.fromtimestamp(time.time() - age_seconds, UTC).isoformat().replace("+00:00", "Z")
    own = {"COLDSTART_HANDLER": "scales", "COLDSTART_STORE": f"file://{project.store}", "HF_TOKEN": SECRET}
    return {
        "id": "pod1",
        "name": "my pod",
        "status": "RUNNING",
        "image": "me/scales:1",
        "args": "",
        "disk": 20,
        "ports": ["8000/http"],
        "env": {**own, "RUNPOD_POD_ID": "pod1", **(env or {})},
        "registry": None,
        "template": "tpl1",
        "cloud": "SECURE",
        "dataCenterId": "US-TX-3",
        "gpu": {"id": GPU, "count": 1, "vcpuCount": 8, "memory": 30},
        "mounts": {"network": [{"volumeId": "vol1", "path": str(project.folder)}]},
        "createdAt": started,
        "startedAt": started,
        "locked": False,
        "_ahead": [],
        **changes,
    }


def client_of(plane):
    """A client that waits for nothing."""
    return RestClient(plane.url, API_KEY, sleep=lambda _: None)


def hibernator(plane, project, *, store=None, said=None):
    """A hibernator with polls that take no time."""
    repository = Repository(store or LocalStore(str(project.store)))
    say = (said if said is not None else []).append
    return Hibernator(client_of(plane), repository, load(), say=say, poll_seconds=POLL_SECONDS)


def hibernate(plane, project, identity="pod1", *, wait_seconds=0.0, **options):
    """Hibernate a pod."""
    made = {name: options.pop(name) for name in ("store", "said") if name in options}
    return hibernator(plane, project, **made).hibernate(identity, wait_seconds=wait_seconds, **options)


def actions(plane):
    """What was done to pods."""
    return [seen.body["action"] for seen in plane.seen if seen.path.endswith("/action")]


# --- the order -------------------------------------------------------------------------------------------------------


class Watched(LocalStore):
    """A store that notes what is read and written, in the list that the requests are noted in too."""

    def __init__(self, path, log):
        super().__init__(path)
        self.log = log

    def get(self, key):
        self.log.append(("get", key))
        return super().get(key)

    def put(self, key, data, **options):
        self.log.append(("put", key))
        return super().put(key, data, **options)


def test_the_pod_is_ended_after_every_byte_was_verified(plane, project, monkeypatch):
    """Every blob is read, the record written, the pod looked at once more, and only then is it terminated."""
    log = []
    answer = plane.answer
    monkeypatch.setattr(plane, "answer", lambda seen: (log.append((seen.method, seen.path)), answer(seen))[1])
    done = hibernate(plane, project, store=Watched(str(project.store), log))
    manifest = json.loads(project.objects("manifests/scales")[0].read_text())
    blobs = {f"blobs/{path.parent.name}/{path.name}" for path in project.objects("blobs")}
    wanted = {key for key in blobs if key.rpartition("/")[2] in json.dumps(manifest)}
    end = log.index(("POST", "/v2/pods/pod1/action"))
    read = [index for index, (verb, key) in enumerate(log) if verb == "get" and key in wanted]
    assert wanted
    assert {log[index][1] for index in read} == wanted
    assert max(read) < log.index(("put", "pods/scales.json")) < end
    assert log[end - 1] == ("GET", "/v2/pods/pod1")
    assert log[0] == ("GET", "/v2/pods/pod1")
    assert log[end + 1 :] == [("GET", "/v2/pods/pod1")]
    assert plane.pods["pod1"]["status"] == "TERMINATED"
    assert (done.name, done.pod, done.action) == ("scales", "pod1", "terminate")
    assert [(name, generation) for name, generation, _ in done.proven.generations] == [("scales", 1)]
    assert done.proven.stored_bytes > 0


def test_keep_stops_the_pod(plane, project):
    """Asked to, the pod is stopped, once verified."""
    assert hibernate(plane, project, keep=True).action == "stop"
    assert actions(plane) == ["stop"]
    assert plane.pods["pod1"]["status"] == "EXITED"


def test_all_parts_of_a_state_are_verified(plane, project):
    """A state of several parts has a snapshot for each, and each counts."""
    plane.pods["pod1"]["env"]["COLDSTART_HANDLER"] = "parts"
    done = hibernate(plane, project)
    assert [name for name, _, _ in done.proven.generations] == ["parts=first", "parts=second"]
    assert actions(plane) == ["terminate"]


def test_a_part_that_lacks_a_generation_leaves_the_pod(plane, project):
    """One part without a snapshot is enough of a doubt."""
    plane.pods["pod1"]["env"]["COLDSTART_HANDLER"] = "parts"
    project.ref("parts=second").unlink()
    with pytest.raises(DeployError, match=r"snapshot 'parts' has no generation for key [0-9a-f]+ yet"):
        hibernate(plane, project)
    assert not actions(plane)


def test_what_is_remembered_holds_no_secret(plane, project):
    """Template, image, GPU, disk, mounts, ports and names of variables are stored; values are not."""
    hibernate(plane, project)
    text = (project.store / "pods" / "scales.json").read_text()
    record = json.loads(text)
    assert SECRET not in text
    assert record["env_names"] == ["COLDSTART_HANDLER", "COLDSTART_STORE", "HF_TOKEN"]
    assert (record["template"], record["image"], record["disk"]) == ("tpl1", "me/scales:1", 20)
    assert record["gpu"] == {"id": GPU, "count": 1}
    assert record["mounts"] == {"network": [{"volumeId": "vol1", "path": str(project.folder)}]}
    assert record["ports"] == ["8000/http"]
    assert not record["has_args"]


# --- doubts ----------------------------------------------------------------------------------------------------------


def test_a_damaged_blob_leaves_the_pod(plane, project):
    """One flipped bit in one blob, and nothing is terminated or remembered; the message says what to do."""
    manifest = project.objects("manifests/scales")[0].read_text()
    blob = next(path for path in project.objects("blobs") if path.name in manifest)
    flip(blob, blob.stat().st_size - 1)
    with pytest.raises(
        SnapshotError, match=r"'scales' generation 1 is damaged .chunk 0: .*coldstart snapshot delete scales"
    ):
        hibernate(plane, project)
    assert not actions(plane)
    assert not (project.store / "pods").exists()


@pytest.mark.parametrize("kind", ["manifests/scales", "refs/scales"])
def test_a_missing_manifest_or_ref_leaves_the_pod(kind, plane, project):
    """What cannot be read is no snapshot."""
    for path in project.objects(kind):
        path.unlink()
    with pytest.raises(ColdstartError, match=r"manifest of 'scales' generation 1 is gone|has no generation for key"):
        hibernate(plane, project)
    assert not actions(plane)


def test_a_malformed_ref_leaves_the_pod(plane, project):
    """A ref that cannot be read is as good as damage."""
    project.ref("scales").write_text("{}")
    with pytest.raises(ColdstartError):
        hibernate(plane, project)
    assert not actions(plane)


def change_record(project, name="scales", **changes):
    """Change the only start record of a name."""
    (path,) = project.objects(f"starts/{name}")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


@pytest.mark.parametrize(("worker", "ended"), [("pod1", True), ("", True), ("another-pod", False)])
def test_only_records_of_the_pod_itself_count(worker, ended, plane, project):
    """A start record that names another worker says nothing of this pod; one that names none might be its own."""
    for path in project.objects("starts"):
        document = json.loads(path.read_text())
        path.chmod(0o644)
        path.write_text(json.dumps({**document, "worker": worker}))
    if ended:
        hibernate(plane, project)
    else:
        with pytest.raises(DeployError, match="no worker of 'scales' has written a start record"):
            hibernate(plane, project)
    assert bool(actions(plane)) is ended


def test_no_worker_since_the_pod_started_leaves_the_pod(plane, project):
    """A snapshot that an earlier worker made is no proof of what this pod's worker depends on."""
    change_record(project, process_start_unix_seconds=time.time() - 7200)
    with pytest.raises(DeployError, match="no worker of 'scales' has written a start record into file://"):
        hibernate(plane, project)
    assert not actions(plane)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"key": 1}', '{"key": "a", "process_start_unix_seconds": "x"}'])
def test_a_start_record_that_says_nothing_is_none(text, plane, project):
    """A malformed record is no evidence."""
    change_record(project).write_text(text)
    with pytest.raises(DeployError, match="no worker of 'scales' has written a start record"):
        hibernate(plane, project)
    assert not actions(plane)


def test_a_worker_without_a_key_leaves_the_pod(plane, project):
    """One that makes no snapshots has nothing to wake from."""
    change_record(project, key="")
    with pytest.raises(DeployError, match="the worker of 'scales' makes no snapshot"):
        hibernate(plane, project)
    assert not actions(plane)


def test_a_generation_that_the_worker_could_not_start_from_leaves_the_pod(plane, project):
    """After a fallback the generation that was there is not good enough; one that is newer is."""
    (path,) = project.objects("starts/scales")
    change_record(project, kind="fallback", own_kind="fallback", process_start_unix_seconds=time.time() + 600)
    with pytest.raises(DeployError, match="the generation 1 of 'scales' is older than the worker"):
        hibernate(plane, project)
    assert not actions(plane)
    change_record(project, kind="restored", own_kind="restored")
    assert path.exists()
    hibernate(plane, project)
    assert actions(plane) == ["terminate"]


def test_workers_of_several_keys_leave_the_pod_until_one_is_named(plane, project):
    """Nothing says which is the pod's: ``--key`` does."""
    (path,) = project.objects("starts/scales")
    record = json.loads(path.read_text())
    path.with_name("other.json").write_text(json.dumps({**record, "key": "f" * 32}))
    with pytest.raises(DeployError, match=r"with different keys have started .* give --key"):
        hibernate(plane, project)
    with pytest.raises(DeployError, match=f"no generation for key {'f' * 32} yet"):
        hibernate(plane, project, key="ffff")
    with pytest.raises(DeployError, match="no worker of 'scales' with key 'zz' has started"):
        hibernate(plane, project, key="zz")
    assert not actions(plane)
    hibernate(plane, project, key=record["key"][:8])
    assert actions(plane) == ["terminate"]


def test_a_generation_is_waited_for(plane, project):
    """The worker makes it after its warm-up: as soon as it is there, it is verified and the pod ended."""
    path = project.ref("scales")
    text = path.read_text()
    path.unlink()
    said = []

    class Telling(list):
        def append(self, line):
            said.append(line)
            if line.startswith("waiting: snapshot 'scales' has no generation"):
                threading.Timer(0.05, path.write_text, (text,)).start()

    hibernate(plane, project, wait_seconds=LONG_SECONDS, said=Telling())
    assert actions(plane) == ["terminate"]
    assert len([line for line in said if line.startswith("waiting")]) == 1


def test_a_generation_that_is_replaced_meanwhile_is_verified_too(plane, project):
    """What is current when the pod ends is what was read, not what was current at first."""
    path = project.ref("scales")
    ref = json.loads(path.read_text())
    old = project.store / ref["manifest"]
    new = project.store / manifest_key("scales", 2, "0" * 16)
    document = json.loads(old.read_text())
    new.write_text(json.dumps({**document, "generation": 2}))

    class Replacing(LocalStore):
        def get(self, key):
            found = super().get(key)
            if key.startswith("blobs/"):
                path.write_text(json.dumps({**ref, "generation": 2, "manifest": str(new.relative_to(project.store))}))
            return found

    done = hibernate(plane, project, store=Replacing(str(project.store)))
    assert [generation for _, generation, _ in done.proven.generations] == [2]


def test_a_snapshot_that_is_deleted_meanwhile_leaves_the_pod(plane, project):
    """What was whole when it was read has to be there still."""
    path = project.ref("scales")

    class Deleting(LocalStore):
        def get(self, key):
            found = super().get(key)
            if key.startswith("blobs/"):
                path.unlink(missing_ok=True)
            return found

    with pytest.raises(DeployError, match="has no generation for key"):
        hibernate(plane, project, store=Deleting(str(project.store)))
    assert not actions(plane)


@pytest.mark.parametrize(
    ("changes", "kind", "told"),
    [
        ({"status": "EXITED"}, ConflictError, "pod pod1 is EXITED: only a running one"),
        ({"status": "STARTING"}, ConflictError, "pod pod1 is STARTING"),
        ({"locked": True}, ConflictError, "is locked: unlock it first"),
        ({"cluster": {"id": "c"}}, ConflictError, "is one of a cluster"),
        ({"startedAt": None, "createdAt": None}, DeployError, "does not say when pod pod1 started"),
        ({"startedAt": "soon"}, DeployError, "does not say when pod pod1 started"),
        ({"mounts": {}}, ConflictError, "is on a disk of pod pod1 that ends with it"),
        ({"mounts": {"network": [{"volumeId": "v", "path": "/elsewhere"}]}}, ConflictError, "ends with it: keep"),
        ({"template": None, "image": None}, DeployError, "shows neither a template nor an image"),
    ],
)
def test_a_pod_that_cannot_hibernate_is_left(changes, kind, told, plane, project):
    """Each doubt about the pod itself is told before anything is done."""
    plane.pods["pod1"] = pod(project, **changes)
    with pytest.raises(kind, match=told):
        hibernate(plane, project)
    assert not actions(plane)


@pytest.mark.parametrize(
    ("env", "kind", "told"),
    [
        ({"COLDSTART_HANDLER": ""}, UsageError, "has no COLDSTART_HANDLER in its environment.* give --name"),
        ({"COLDSTART_STORE": ""}, ConflictError, r"does not say where \(COLDSTART_STORE is not set\)"),
        ({"COLDSTART_STORE": "s3://other/prefix"}, ConflictError, "keeps its snapshots in s3://other/prefix"),
        ({"COLDSTART_STORE": "off"}, ConflictError, "keeps its snapshots in "),
        ({"COLDSTART_STORE": f"odd://u:{SECRET}@h/x"}, ConflictError, "keeps its snapshots in odd://..., and"),
        ({"COLDSTART_ENDPOINT_URL": "https://other"}, ConflictError, "another COLDSTART_ENDPOINT_URL than is set here"),
    ],
)
def test_a_pod_of_another_store_is_left(env, kind, told, plane, project):
    """A snapshot in another store proves nothing, and no secret is repeated."""
    plane.pods["pod1"] = pod(project, env=env)
    with pytest.raises(kind, match=told) as found:
        hibernate(plane, project)
    assert SECRET not in str(found.value)
    assert not actions(plane)


def test_a_persistent_disk_is_not_destroyed_unasked(plane, project):
    """Terminating destroys it, so the pod is left unless that, or stopping, is asked for."""
    mounts = {**pod(project)["mounts"], "persistent": {"size": 20, "path": "/workspace"}}
    plane.pods["pod1"]["mounts"] = mounts
    with pytest.raises(ConflictError, match="has a persistent disk at /workspace, which terminating destroys"):
        hibernate(plane, project)
    assert not actions(plane)
    hibernate(plane, project, keep=True)
    plane.pods["pod1"]["status"] = "RUNNING"
    hibernate(plane, project, discard_disk=True)
    assert actions(plane) == ["stop", "terminate"]


def test_a_pod_that_was_restarted_meanwhile_is_left(plane, project):
    """What was verified belongs to the process that ran when it began."""

    class Restarting(LocalStore):
        def put(self, key, data, **options):
            plane.pods["pod1"]["startedAt"] = "2026-01-01T00:00:00Z"
            return super().put(key, data, **options)

    with pytest.raises(ConflictError, match="pod pod1 was restarted or stopped meanwhile"):
        hibernate(plane, project, store=Restarting(str(project.store)))
    assert not actions(plane)


def test_an_unknown_pod_and_a_failing_api_are_told(plane, project):
    """An error of the API before the end leaves the pod; at the end it says that the pod may be gone."""
    with pytest.raises(ResourceMissingError):
        hibernate(plane, project, "pod9")
    plane.fail_next(4, 503)
    with pytest.raises(PlatformBusyError):
        hibernate(plane, project)
    plane.fail_next(1, 403)
    with pytest.raises(CredentialsError):
        hibernate(plane, project)
    assert not actions(plane)


def test_a_pod_that_does_not_end_is_told(plane, project, monkeypatch):
    """It was told to, and it costs money while it does not."""
    monkeypatch.setattr(hibernation, "END_SECONDS", 0.05)
    monkeypatch.setattr(plane, "_act", lambda pod, action: (200, pod))
    with pytest.raises(DeployError, match="pod pod1 was told to terminate and is still RUNNING: look at it"):
        hibernate(plane, project)


def test_a_pod_that_is_gone_has_ended(plane, project, monkeypatch):
    """A pod that is not listed any more is terminated."""
    monkeypatch.setattr(plane, "_act", lambda pod, action: (200, plane.pods.pop(pod["id"])))
    assert hibernate(plane, project).action == "terminate"


# --- waking ----------------------------------------------------------------------------------------------------------


def wake(plane, project, name="scales", *, wait_seconds=LONG_SECONDS, said=None, **options):
    """Wake a pod."""
    repository = Repository(LocalStore(str(project.store)))
    record = read_record(repository.store, name)
    body = body_of(record, name, store_url=repository.store.url, **options)
    say = (said if said is not None else []).append
    waker = Waker(client_of(plane), repository, say=say, poll_seconds=POLL_SECONDS)
    waker.check_alone(name, body)
    return waker.wake(name, body, wait_seconds=wait_seconds)


def starting(plane, project):
    """A worker that starts from the snapshot as soon as a pod was made: its record, as the store has it."""
    create = plane._create

    def create_and_start(kind, seen):
        answer = create(kind, seen)
        if kind == "pods":
            project.run()
        return answer

    plane._create = create_and_start


def test_a_pod_hibernates_and_wakes_from_its_snapshot(plane, project):
    """The new pod is made from the template, with the recorded GPU and volume, and its worker restores the generation."""
    hibernate(plane, project)
    starting(plane, project)
    plane.seen.clear()
    woken = wake(plane, project)
    (create,) = plane.writes
    assert create.path == "/v2/pods"
    assert create.body == {
        "name": "my pod",
        "templateId": "tpl1",
        "env": {"COLDSTART_HANDLER": "scales", "COLDSTART_STORE": f"file://{project.store}"},
        "gpu": {"id": GPU, "count": 1},
        "disk": 20,
        "mounts": {"network": [{"volumeId": "vol1", "path": str(project.folder)}]},
        "ports": ["8000/http"],
        "cloud": "SECURE",
        "dataCenterIds": ["US-TX-3"],
    }
    assert (woken.start["kind"], woken.start["generation"]) == ("restored", 1)
    assert plane.pods[woken.pod]["status"] == "RUNNING"
    assert woken.seconds > 0


def test_an_old_start_record_is_not_taken_for_the_new_one(plane, project):
    """Only what was not there before the request counts, whatever its times say."""
    hibernate(plane, project)
    change_record(project, process_start_unix_seconds=time.time() + 600)
    with pytest.raises(DeployError, match="runs, and no worker of 'scales' has written a start record within 0 s"):
        wake(plane, project, wait_seconds=0.2)


@pytest.mark.parametrize("status", ["RUNNING", "STARTING", "PROVISIONING"])
@pytest.mark.parametrize("same", ["name", "handler"])
def test_a_pod_that_runs_already_is_not_doubled(same, status, plane, project):
    """By its handler or by its name; nothing is made."""
    hibernate(plane, project)
    env = {"COLDSTART_HANDLER": "scales" if same == "handler" else "other"}
    plane.pods["pod2"] = pod(project, env=env, id="pod2", status=status, name="my pod" if same == "name" else "other")
    with pytest.raises(ConflictError, match=f"pod pod2 .* of 'scales' is {status} already: use it, or give --another"):
        wake(plane, project)
    assert [seen.path for seen in plane.writes] == ["/v2/pods/pod1/action"]


def test_a_stopped_pod_is_mentioned(plane, project):
    """One that was kept does not stand in the way, but costs money."""
    hibernate(plane, project, keep=True)
    starting(plane, project)
    said = []
    wake(plane, project, said=said)
    assert "note: pod pod1 (my pod) is stopped, and its disk is billed" in said


@pytest.mark.parametrize("status", ["ERROR", "EXITED", "TERMINATED"])
def test_a_pod_that_ends_instead_of_running_is_told(status, plane, project):
    """With its id and what to do."""
    hibernate(plane, project)
    plane.pod_statuses = ("PROVISIONING", status)
    with pytest.raises(DeployError, match=f"pod pod[s0-9]+ is {status} after .*terminate it if you do not want it"):
        wake(plane, project)


def test_a_pod_that_never_runs_is_told(plane, project):
    """The wait ends, and the pod that is left is named."""
    hibernate(plane, project)
    plane.pod_statuses = ("PROVISIONING",)
    with pytest.raises(DeployError, match="is PROVISIONING after 0 s"):
        wake(plane, project, wait_seconds=0.05)


def record(**changes):
    """A record of a pod without a template, in an object store."""
    document = pod_of({**POD, **changes})
    return record_of(document, "scales")


POD = {
    "id": "p",
    "name": "my pod",
    "status": "RUNNING",
    "image": "me/x:1",
    "env": {"HF_TOKEN": SECRET, "COLDSTART_HANDLER": "scales", "RUNPOD_POD_ID": "p", "PUBLIC_KEY": "ssh"},
    "cpu": {"id": "cpu5c", "vcpuCount": 4, "memory": 8},
    "registry": "reg1",
    "disk": 5,
}
URL = "s3://bucket/prefix"


def test_without_a_template_the_environment_is_whose_wakes_it():
    """The recorded names are read here; what the platform sets itself is not carried along."""
    body = body_of(record(), "scales", store_url=URL, variable={"HF_TOKEN": "other"}.get)
    assert body == {
        "name": "my pod",
        "image": "me/x:1",
        "registry": "reg1",
        "env": {"HF_TOKEN": "other", "COLDSTART_HANDLER": "scales", "COLDSTART_STORE": URL},
        "cpu": {"id": "cpu5c", "vcpuCount": 4},
        "disk": 5,
    }


def test_options_go_before_what_is_remembered():
    """Another GPU, another template: then nothing of the environment is needed."""
    body = body_of(record(), "scales", store_url=URL, template="tpl9", gpu=GPU, variable={}.get)
    assert (body["templateId"], body["gpu"], "image" in body, "cpu" in body) == (
        "tpl9",
        {"id": GPU, "count": 1},
        False,
        False,
    )
    assert body_of(None, "scales", store_url=URL, template="t", gpu=GPU)["name"] == "scales"


@pytest.mark.parametrize(
    ("found", "options", "told"),
    [
        (None, {}, "nothing is remembered of a pod of 'scales' in s3://bucket/prefix: give --template ID and --gpu ID"),
        (None, {"template": "t"}, "nothing is remembered of the GPU of 'scales': give --gpu ID"),
        (record(), {}, "the pod had HF_TOKEN in its environment, and values are not remembered: set them here"),
        (record(args="--token x"), {}, "had arguments of its own and no template, and they are not remembered"),
        (record(), {"template": "t", "store_url": "file:///data"}, "a new pod would not see the store file:///data"),
    ],
)
def test_what_is_missing_to_wake_is_told(found, options, told):
    """Before anything is made."""
    with pytest.raises(UsageError, match=told):
        body_of(found, "scales", **{"store_url": URL, "variable": {}.get, **options})


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2, "name": "scales"}', '{"format": 1, "name": "other"}'])
def test_a_record_of_another_format_is_told(text, project):
    """It is not guessed at."""
    (project.store / "pods").mkdir()
    (project.store / "pods" / "scales.json").write_text(text)
    with pytest.raises(DeployError, match=r"pods/scales.json in file://.* is not a record of 'scales'"):
        read_record(LocalStore(str(project.store)), "scales")


@pytest.mark.parametrize(
    ("url", "paths", "holds"),
    [
        ("s3://b/p", [], True),
        ("memory://x", [], True),
        ("file:///data", [], False),
        ("file:///data", ["/data"], True),
        ("file:///data/a", ["/data/"], True),
        ("file:///database", ["/data"], False),
        ("file:///data/../x", ["/data"], False),
        ("file:///a%25b/c", ["/a%b"], True),
        ("file:///x", ["/"], True),
    ],
)
def test_which_stores_outlive_a_pod(url, paths, holds):
    """Object stores do, folders on a network volume do, and no others."""
    assert outlives(url, paths) is holds


# --- the commands ----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(capsys, monkeypatch):
    """Runs ``coldstart`` in this process: exit status, standard output and error."""
    for made in (Hibernator.__init__, Waker.__init__):
        monkeypatch.setitem(made.__kwdefaults__, "poll_seconds", POLL_SECONDS)

    def run(*words):
        return (main([str(word) for word in words]), *capsys.readouterr())

    return run


def test_the_commands_hibernate_and_wake(command, plane, project):
    """Each says what it did and what it cost to know."""
    status, out, err = command("hibernate", "pod1")
    assert (status, err) == (0, "terminate pod pod1\n")
    first, second = out.splitlines()
    assert first == "scales generation 1: every byte verified"
    assert second.startswith("pod pod1 terminated; ")
    assert second.endswith(" bytes to wake from: coldstart wake scales")
    starting(plane, project)
    status, out, err = command("wake", "scales")
    assert status == 0
    assert out.startswith("scales restored generation 1, ready ")
    assert "woke" in out.splitlines()[1]
    assert "is being made" in err


def test_a_dry_run_of_hibernating_verifies_and_ends_nothing(command, plane, project):
    """The request is printed, neither pod nor store is changed; damage is found all the same."""
    status, out, err = command("hibernate", "pod1", "--dry-run", "--keep")
    assert (status, out) == (0, f'POST {plane.url}/v2/pods/pod1/action {{"action": "stop"}}\n')
    assert "would write file://" in err
    assert not plane.writes
    assert not (project.store / "pods").exists()
    for blob in project.objects("blobs"):
        flip(blob)
    status, out, err = command("hibernate", "pod1", "--dry-run")
    assert (status, out) == (1, "")
    assert "coldstart: SnapshotError: " in err


def test_a_dry_run_of_waking_masks_values(command, plane, project, monkeypatch):
    """The body is printed, without the values of the environment, and nothing is made."""
    plane.pods["pod1"]["template"] = None
    assert command("hibernate", "pod1")[0] == 0
    monkeypatch.setenv("HF_TOKEN", SECRET)
    plane.seen.clear()
    status, out, _ = command("wake", "scales", "--dry-run", "--gpu", "NVIDIA L4")
    body = json.loads(out.partition("/v2/pods ")[2])
    assert status == 0
    assert SECRET not in out
    assert body["env"]["HF_TOKEN"] == "****"
    assert body["env"]["COLDSTART_HANDLER"] == "scales"
    assert body["gpu"] == {"id": "NVIDIA L4", "count": 1}
    assert not plane.writes


def test_another_is_made_when_asked_for(command, plane, project):
    """With ``--another`` a running pod of the same name is no obstacle."""
    assert command("hibernate", "pod1")[0] == 0
    plane.pods["pod2"] = pod(project, id="pod2")
    assert command("wake", "scales")[0] == 1
    starting(plane, project)
    assert command("wake", "scales", "--another")[0] == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["hibernate", "pod1", "--store", "off"], "ConfigError: COLDSTART_STORE=off: there is no store to look into"),
        (["wake", "absent"], "UsageError: nothing is remembered of a pod of 'absent'"),
        (["wake", "../absent"], "ManifestError: '../absent' cannot name a snapshot"),
    ],
)
def test_wrong_usage_is_told_in_one_line(words, told, command, plane):
    """One line, status 1, nothing sent."""
    status, out, err = command(*words)
    assert (status, out) == (1, "")
    assert err.startswith(f"coldstart: {told}")
    assert err.count("\n") == 1
    assert not plane.writes


def test_without_a_key_nothing_can_be_asked(command, plane, monkeypatch):
    """A dry run too has to look at the pod."""
    monkeypatch.delenv("RUNPOD_API_KEY")
    assert "CredentialsError: RUNPOD_API_KEY is not set" in command("hibernate", "pod1")[2]
    assert "even a dry run has to ask for the pods that there are" in command("hibernate", "pod1", "--dry-run")[2]


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "x"])
def test_a_wait_that_is_none_is_wrong_usage(text):
    """The command line's own parser refuses it."""
    with pytest.raises(ValueError):
        hibernate_command.seconds(text)
