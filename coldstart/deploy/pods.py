"""Pods of RunPod, as far as hibernating and waking need them: what one is, what to remember of it, how to make it again.

What is remembered lies in the store, at ``pods/<name>.json``, and is free of secrets: of the environment the names alone,
of the container's arguments only whether there were any. Their values come from the template, or from the environment of
whoever wakes the pod.
"""

from __future__ import annotations

import json
import os
import time
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

from coldstart.config import read_variable
from coldstart.deploy.plan import MARK
from coldstart.deploy.rest import Recorder, listed, segment
from coldstart.errors import CredentialsError, DeployError, ObjectMissingError, ResourceMissingError, UsageError
from coldstart.manifest import check_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from coldstart.deploy.rest import Client
    from coldstart.stores.base import Store

STORE = "COLDSTART_STORE"
RUNNING, EXITED, TERMINATED = "RUNNING", "EXITED", "TERMINATED"
ON_THE_WAY = ("PROVISIONING", "STARTING")
RECORD_FORMAT = 1
_INJECTED = ("RUNPOD_", "PUBLIC_KEY", "JUPYTER_PASSWORD")
"""Variables that the platform sets itself, by their beginnings."""


class Pod(NamedTuple):
    """A pod, as the API describes it. ``started_seconds``: Unix time, None where it does not say."""

    id: str
    name: str
    status: str
    env: Mapping[str, str]
    started_seconds: float | None
    document: Mapping[str, Any]

    @property
    def network_paths(self) -> tuple[str, ...]:
        """Where network volumes are mounted."""
        return tuple(str(each["path"]) for each in (self.document.get("mounts") or {}).get("network") or ())

    @property
    def disk_path(self) -> str:
        """Where a persistent disk of its host is mounted, "" without one. Terminating the pod destroys it."""
        return str(((self.document.get("mounts") or {}).get("persistent") or {}).get("path") or "")


def pod_of(document: Any) -> Pod:
    """Read what the API answered. Raises DeployError for what is no pod."""
    if not isinstance(document, dict) or not document.get("id") or not document.get("status"):
        raise DeployError(f"RunPod answered with something that is no pod: {str(document)[:200]}")
    env = document.get("env")
    return Pod(
        str(document["id"]),
        str(document.get("name") or ""),
        str(document["status"]),
        env if isinstance(env, dict) else {},
        _unix_seconds(document.get("startedAt") or document.get("createdAt")),
        document,
    )


def _unix_seconds(text: Any) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except (TypeError, ValueError):
        return None


def get_pod(client: Client, identity: str) -> Pod:
    """Ask for a pod. Raises DeployError; CredentialsError in a dry run without a key, which cannot ask."""
    check_can_ask(client)
    return pod_of(client.request("GET", _path(identity)))


def check_can_ask(client: Client) -> None:
    """Raise CredentialsError for a dry run without a key."""
    if isinstance(client, Recorder) and not client.knows:
        raise CredentialsError("RUNPOD_API_KEY is not set: even a dry run has to ask for the pods that there are")


def list_pods(client: Client) -> list[Pod]:
    """All pods of the account. Raises DeployError."""
    check_can_ask(client)
    return [pod_of(document) for document in listed(client, "/v2/pods", "pods")]


def act(client: Client, identity: str, action: str) -> None:
    """Have a pod ``stop`` or ``terminate``. Raises DeployError."""
    client.request("POST", f"{_path(identity)}/action", {"action": action})


def await_status(
    client: Client, identity: str, wanted: str, *, wait_seconds: float, poll_seconds: float
) -> tuple[str, float]:
    """Ask until the pod has the status ``wanted``, has ended otherwise, or the time is over.

    Returns its last status and the seconds that were left. One that is not there any more is terminated.
    """
    deadline_seconds = time.monotonic() + wait_seconds
    while True:
        status = _status(client, identity)
        left_seconds = max(0.0, deadline_seconds - time.monotonic())
        is_last = status in (wanted, TERMINATED, "ERROR") or (status == EXITED and wanted == RUNNING)
        if is_last or not left_seconds:
            return status, left_seconds
        time.sleep(min(poll_seconds, left_seconds))


def _status(client: Client, identity: str) -> str:
    try:
        return get_pod(client, identity).status
    except ResourceMissingError:
        return TERMINATED


def outlives(store_url: str, network_paths: Sequence[str]) -> bool:
    """Whether a store is there when a pod is not: object storage, or a folder on one of its network volumes."""
    if not store_url.startswith("file://"):
        return True
    path = os.path.normpath(unquote(store_url.removeprefix("file://")))
    folders = [os.path.normpath(each) for each in network_paths]
    return any(path == folder or path.startswith(folder.rstrip("/") + "/") for folder in folders)


def _path(identity: str) -> str:
    return f"/v2/pods/{segment(identity)}"


# --- what is remembered ----------------------------------------------------------------------------------------------


def record_key(name: str) -> str:
    """Where the record of a hibernating pod lies in the store."""
    return f"pods/{check_name(name)}.json"


def record_of(pod: Pod, name: str) -> dict[str, Any]:
    """What is needed to make the pod again. Raises DeployError for one without a template and an image."""
    found = pod.document
    template = found.get("template") or found.get("templateId")
    if not template and not found.get("image"):
        raise DeployError(f"pod {pod.id} shows neither a template nor an image, so it could not be made again")
    gpu, cpu = found.get("gpu"), found.get("cpu")
    mounts = {kind: value for kind, value in (found.get("mounts") or {}).items() if value}
    return {
        "format": RECORD_FORMAT,
        "name": name,
        "pod": pod.id,
        "pod_name": pod.name,
        "hibernated_seconds": round(time.time(), 3),
        "template": template or None,
        "image": found.get("image"),
        "registry": found.get("registry"),
        "gpu": {"id": gpu["id"], "count": gpu.get("count") or 1} if gpu else None,
        "cpu": {"id": cpu["id"], "vcpuCount": cpu["vcpuCount"]} if cpu else None,
        "cloud": found.get("cloud"),
        "data_center": found.get("dataCenterId"),
        "disk": found.get("disk"),
        "mounts": mounts,
        "ports": found.get("ports") or [],
        "has_args": bool(found.get("args") or found.get("cmd") or found.get("entrypoint")),
        "env_names": sorted(each for each in pod.env if not each.startswith(_INJECTED)),
    }


def read_record(store: Store, name: str) -> dict[str, Any] | None:
    """The record of a hibernating pod, None without one. Raises StoreError, and DeployError for one of another format."""
    try:
        data = store.get(record_key(name)).data
    except ObjectMissingError:
        return None
    try:
        record = json.loads(data)
    except ValueError:
        record = None
    if not isinstance(record, dict) or record.get("format") != RECORD_FORMAT or record.get("name") != name:
        raise DeployError(
            f"{record_key(name)} in {store.url} is not a record of {name!r} that this coldstart reads: give --template"
            " and --gpu, or update coldstart"
        )
    return record


# --- making it again -------------------------------------------------------------------------------------------------


def body_of(
    record: Mapping[str, Any] | None,
    name: str,
    *,
    store_url: str,
    template: str = "",
    gpu: str = "",
    variable: Callable[[str], str | None] = read_variable,
) -> dict[str, Any]:
    """The body that makes the pod of ``record`` again; ``template`` and ``gpu`` go before what it says.

    With a template the environment is the template's; without one, the recorded names are read through ``variable``.
    Raises UsageError for what is missing.
    """
    found = dict(record or {})
    template = template or str(found.get("template") or "")
    if not template and not found.get("image"):
        raise UsageError(f"nothing is remembered of a pod of {name!r} in {store_url}: give --template ID and --gpu ID")
    body: dict[str, Any] = {"name": found.get("pod_name") or name}
    if template:
        body |= {"templateId": template, "env": {}}
    else:
        body |= {"image": found["image"], "env": _environment(found, variable)}
        if found.get("registry"):
            body["registry"] = found["registry"]
    body["env"] |= {MARK: name, STORE: store_url}
    body |= _compute(found, name, gpu) | _places(found)
    if not outlives(store_url, [each["path"] for each in body.get("mounts", {}).get("network", ())]):
        raise UsageError(f"a new pod would not see the store {store_url}: it is no network volume of the pod's")
    return body


def _environment(found: Mapping[str, Any], variable: Callable[[str], str | None]) -> dict[str, str]:
    if found.get("has_args"):
        raise UsageError(
            f"pod {found['pod']} had arguments of its own and no template, and they are not remembered (they may hold"
            " secrets): make a template with them, and give --template ID"
        )
    names = [name for name in found.get("env_names", ()) if name not in (MARK, STORE)]
    missing = [name for name in names if variable(name) is None]
    if missing:
        raise UsageError(
            f"the pod had {', '.join(missing)} in its environment, and values are not remembered: set them here, or put"
            " them into a template and give --template ID"
        )
    return {name: variable(name) or "" for name in names}


def _compute(found: Mapping[str, Any], name: str, gpu: str) -> dict[str, Any]:
    if gpu:
        return {"gpu": {"id": gpu, "count": (found.get("gpu") or {}).get("count") or 1}}
    for kind in ("gpu", "cpu"):
        if found.get(kind):
            return {kind: dict(found[kind])}
    raise UsageError(f"nothing is remembered of the GPU of {name!r}: give --gpu ID, such as 'NVIDIA GeForce RTX 4090'")


def _places(found: Mapping[str, Any]) -> dict[str, Any]:
    """Disk, mounts and ports. A network volume ties the pod to its data centre; without one it may run anywhere."""
    body = {key: found[key] for key in ("disk", "mounts", "ports", "cloud") if found.get(key)}
    if (found.get("mounts") or {}).get("network") and found.get("data_center"):
        body["dataCenterIds"] = [found["data_center"]]
    return body
