"""Hibernating a pod and waking it: the pod is ended only once a store has all that a new one starts from.

A stopped pod is tied to its host and may never get its GPU back, so hibernating terminates: the state is in the store,
and waking is a new pod, anywhere, that restores it. Nothing is terminated while anything is in doubt.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart import config
from coldstart.deploy import pods
from coldstart.deploy.evidence import find_proven, is_of, read_start, record_keys
from coldstart.deploy.plan import MARK
from coldstart.errors import ConflictError, DeployError, StoreSetupError, UsageError
from coldstart.stores import StoreOptions, open_store

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from coldstart.config import Settings
    from coldstart.deploy.evidence import Proven
    from coldstart.deploy.pods import Pod
    from coldstart.deploy.rest import Client
    from coldstart.repository import Repository

POLL_SECONDS = 3.0
END_SECONDS = 300.0
"""How long a pod that was told to end has for it."""

_PLACE_FIELDS = ("endpoint_url", "r2_account_id")


class Hibernation(NamedTuple):
    """A pod that hibernates: its name and id, what was done to it, and the generations that it will wake from."""

    name: str
    pod: str
    action: str
    proven: Proven


class Waking(NamedTuple):
    """A pod that woke: its id, the record of its worker's start, and the seconds from the request to its being seen."""

    pod: str
    start: Mapping[str, Any]
    seconds: float


class Hibernator:
    """Ends a pod once its snapshot is proven to be in the store. ``say`` is told what is being waited for."""

    def __init__(
        self,
        client: Client,
        repository: Repository,
        settings: Settings,
        *,
        say: Callable[[str], None],
        poll_seconds: float = POLL_SECONDS,
        dry_run: bool = False,
    ) -> None:
        self._client = client
        self._repository = repository
        self._settings = settings
        self._say = say
        self._poll_seconds = poll_seconds
        self._dry_run = dry_run

    def hibernate(
        self,
        identity: str,
        *,
        name: str = "",
        key: str = "",
        wait_seconds: float,
        keep: bool = False,
        discard_disk: bool = False,
    ) -> Hibernation:
        """Verify, remember, and only then terminate the pod (``keep``: stop it). The order is the promise.

        Raises ColdstartError for any doubt, and then nothing was done to the pod.
        """
        pod = pods.get_pod(self._client, identity)
        name = name or pod.env.get(MARK, "")
        since_seconds = self._check(pod, name, disk_may_go=keep or discard_disk)
        proven = find_proven(
            self._repository,
            name,
            worker=pod.id,
            since_seconds=since_seconds,
            key=key,
            wait_seconds=wait_seconds,
            poll_seconds=self._poll_seconds,
            say=self._say,
        )
        self._remember(pod, name)
        self._check_same(pod)
        action = "stop" if keep else "terminate"
        self._end(pod, action)
        return Hibernation(name, pod.id, action, proven)

    def _check(self, pod: Pod, name: str, *, disk_may_go: bool) -> float:
        """Check that the pod can hibernate at all; when it started (Unix time). Raises DeployError and UsageError."""
        if not name:
            raise UsageError(
                f"pod {pod.id} has no {MARK} in its environment, so nothing says whose snapshot to look for: give --name"
            )
        if pod.status != pods.RUNNING:
            raise ConflictError(f"pod {pod.id} is {pod.status}: only a running one has a worker to hibernate")
        if pod.document.get("locked") or pod.document.get("cluster"):
            why = "locked: unlock it first" if pod.document.get("locked") else "one of a cluster: end the cluster"
            raise ConflictError(f"pod {pod.id} is {why}")
        if pod.disk_path and not disk_may_go:
            raise ConflictError(
                f"pod {pod.id} has a persistent disk at {pod.disk_path}, which terminating destroys: save what you need of"
                " it and give --discard-disk, or --keep to stop the pod instead"
            )
        if pod.started_seconds is None:
            raise DeployError(
                f"RunPod does not say when pod {pod.id} started, so its worker's records cannot be told apart"
            )
        self._check_store(pod)
        return pod.started_seconds

    def _check_store(self, pod: Pod) -> None:
        """Check that the pod's worker keeps its snapshots where we look for them. Raises ConflictError."""
        url = self._repository.store.url
        given = {field: each.text for field, each in config.given(pod.env).items()}
        theirs = self._store_url(given.get("store", ""))
        if theirs != url:
            said = f"keeps its snapshots in {theirs}" if theirs else f"does not say where ({pods.STORE} is not set)"
            raise ConflictError(f"pod {pod.id} {said}, and this looks into {url}: give --store with the pod's store")
        for field in _PLACE_FIELDS:
            text = given.get(field, "")
            if not text.startswith("{{") and text != getattr(self._settings, field):  # {{ }}: one of RunPod's secrets
                raise ConflictError(
                    f"pod {pod.id} has another COLDSTART_{field.upper()} than is set here, so {url} may be another store:"
                    " set it here as the pod has it"
                )
        if not pods.outlives(url, pod.network_paths):
            raise ConflictError(
                f"the store {url} is on a disk of pod {pod.id} that ends with it: keep snapshots on a network volume or in"
                " object storage (s3://, r2://)"
            )

    def _store_url(self, text: str) -> str:
        """A store's address as the store itself has it; without what follows the scheme where it is none."""
        options = StoreOptions(*(getattr(self._settings, field) for field in StoreOptions._fields))
        try:
            return open_store(text, options).url if text else ""
        except StoreSetupError:
            return f"{text.partition('://')[0]}://..."

    def _remember(self, pod: Pod, name: str) -> None:
        record = pods.record_of(pod, name)
        if self._dry_run:
            self._say(f"would write {self._repository.store.url}/{pods.record_key(name)}")
            return
        self._repository.store.put(pods.record_key(name), json.dumps(record, indent=1).encode())

    def _check_same(self, pod: Pod) -> None:
        """Look once more: what was verified belongs to the process that ran when we began."""
        now = pods.get_pod(self._client, pod.id)
        if (now.status, now.started_seconds) != (pod.status, pod.started_seconds):
            raise ConflictError(f"pod {pod.id} was restarted or stopped meanwhile: try again")

    def _end(self, pod: Pod, action: str) -> None:
        self._say(f"{action} pod {pod.id}")
        pods.act(self._client, pod.id, action)
        if self._dry_run:
            return
        wanted = pods.EXITED if action == "stop" else pods.TERMINATED
        status, _ = pods.await_status(
            self._client, pod.id, wanted, wait_seconds=END_SECONDS, poll_seconds=self._poll_seconds
        )
        if status not in (wanted, pods.TERMINATED):
            raise DeployError(
                f"pod {pod.id} was told to {action} and is still {status}: look at it, for it costs money"
            )


# --- waking ----------------------------------------------------------------------------------------------------------


class Waker:
    """Makes a pod that starts from the snapshot of one that hibernates."""

    def __init__(
        self,
        client: Client,
        repository: Repository,
        *,
        say: Callable[[str], None],
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        self._client = client
        self._repository = repository
        self._say = say
        self._poll_seconds = poll_seconds

    def check_alone(self, name: str, body: Mapping[str, Any]) -> None:
        """Raise ConflictError where a pod of that name runs already, or is on its way."""
        live = (pods.RUNNING, *pods.ON_THE_WAY)
        for pod in pods.list_pods(self._client):
            if pod.status in live and (pod.env.get(MARK) == name or pod.name == body["name"]):
                raise ConflictError(
                    f"pod {pod.id} ({pod.name}) of {name!r} is {pod.status} already: use it, or give --another"
                )
            if pod.status == pods.EXITED and pod.env.get(MARK) == name:
                self._say(f"note: pod {pod.id} ({pod.name}) is stopped, and its disk is billed")

    def create(self, body: Mapping[str, Any]) -> str:
        """Make the pod; its id. Raises DeployError."""
        made = self._client.request("POST", "/v2/pods", body)
        if not isinstance(made, dict) or not made.get("id"):
            raise DeployError(
                f"RunPod took the request for a pod and gave no id: look whether one named {body['name']} runs"
            )
        return str(made["id"])

    def wake(self, name: str, body: Mapping[str, Any], *, wait_seconds: float) -> Waking:
        """Make the pod and wait until its worker has written its start record. Raises DeployError and StoreError."""
        before = record_keys(self._repository, name)
        began = time.monotonic()
        identity = self.create(body)
        self._say(f"pod {identity} is being made")
        status, left_seconds = pods.await_status(
            self._client, identity, pods.RUNNING, wait_seconds=wait_seconds, poll_seconds=self._poll_seconds
        )
        if status != pods.RUNNING:
            raise DeployError(
                f"pod {identity} is {status} after {time.monotonic() - began:.0f} s: look at its logs, and terminate it if you"
                " do not want it"
            )
        self._say(f"pod {identity} runs; waiting for its worker")
        start = self._await_start(name, identity, before, left_seconds)
        if start is None:
            raise DeployError(
                f"pod {identity} runs, and no worker of {name!r} has written a start record within {wait_seconds:.0f} s: look"
                " at its logs, and terminate it if you do not want it"
            )
        return Waking(identity, start, time.monotonic() - began)

    def _await_start(
        self, name: str, worker: str, before: Mapping[str, float], wait_seconds: float
    ) -> dict[str, Any] | None:
        """The first start record of the worker that was not there before. By its key, since clocks differ."""
        deadline_seconds = time.monotonic() + wait_seconds
        while True:
            for key in record_keys(self._repository, name).keys() - before.keys():
                start = read_start(self._repository, key)
                if start is not None and is_of(start, worker):
                    return start
            if time.monotonic() >= deadline_seconds:
                return None
            time.sleep(min(self._poll_seconds, max(0.0, deadline_seconds - time.monotonic())))
