"""Bringing RunPod to what a plan says, by name: what is absent is created, what differs is changed, the rest is left."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.deploy.plan import MARK, template_name
from coldstart.deploy.rest import listed, segment
from coldstart.errors import ConflictError, DeployError, ResourceMissingError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coldstart.deploy.plan import Plan
    from coldstart.deploy.rest import Client

_TEMPLATES = ("/v2/templates", "templates")
_ENDPOINTS = ("/v2/serverless", "endpoints")
_FIXED = ("type",)
"""Fields of an endpoint that RunPod cannot change."""
_CONTAINER = ("image", "disk", "env", "registry")


class Step(NamedTuple):
    """What was done to one resource: ``created``, ``updated`` (with the names of ``fields``), ``unchanged``, ``deleted``."""

    kind: str
    name: str
    id: str
    action: str
    fields: tuple[str, ...] = ()

    def __str__(self) -> str:
        fields = f": {', '.join(self.fields)}" if self.fields else ""
        return f"{self.kind} {self.name} ({self.id}) {self.action}{fields}"


def apply_plan(client: Client, plan: Plan) -> tuple[Step, Step]:
    """Create or change the plan's template and endpoint. All that can be seen to fail is seen before the first write.

    Raises ConflictError where the names are ambiguous or not ours, and for changes that RunPod cannot make; other
    DeployErrors as the API answers.
    """
    template = _find(client, _TEMPLATES, plan.template["name"])
    endpoint = _find(client, _ENDPOINTS, plan.endpoint["name"])
    wanted = {**plan.endpoint, **{key: plan.template[key] for key in _CONTAINER}}
    for found in (template, endpoint):
        _check_ours(found)
    _check_changeable(endpoint, wanted)
    template_id, first = _bring(client, _TEMPLATES, "template", template, plan.template, plan.template)
    creating = {**plan.endpoint, "templateId": template_id}
    return first, _bring(client, _ENDPOINTS, "endpoint", endpoint, wanted, creating)[1]


def delete(client: Client, name: str) -> tuple[Step, ...]:
    """Delete the endpoint ``name`` and its template, as far as they are there. Raises ResourceMissingError for none."""
    named = (("endpoint", _ENDPOINTS, name), ("template", _TEMPLATES, template_name(name)))
    found = [(kind, place, each, _find(client, place, each)) for kind, place, each in named]
    for *_, resource in found:
        _check_ours(resource)
    steps = tuple(
        _delete_one(client, kind, place, each, resource["id"]) for kind, place, each, resource in found if resource
    )
    if not steps:
        raise ResourceMissingError(f"no endpoint {name!r} and no template of it is there: check --name and the account")
    return steps


def _delete_one(client: Client, kind: str, place: tuple[str, str], name: str, identity: str) -> Step:
    with suppress(ResourceMissingError):  # an attempt whose answer was lost has deleted it
        client.request("DELETE", f"{place[0]}/{segment(identity)}")
    return Step(kind, name, identity, "deleted")


def _find(client: Client, place: tuple[str, str], name: str) -> dict[str, Any] | None:
    path, key = place
    found = [each for each in listed(client, path, key) if each.get("name") == name]
    if len(found) > 1:
        ids = ", ".join(str(each.get("id")) for each in found)
        raise ConflictError(f"there are {len(found)} {key} named {name!r} ({ids}): delete or rename all but one")
    return found[0] if found else None


def _check_ours(found: Mapping[str, Any] | None) -> None:
    if found is not None and MARK not in (found.get("env") or {}):
        raise ConflictError(
            f"{found['name']!r} ({found['id']}) is there already and was not made by coldstart (its environment has no"
            f" {MARK}): it is left alone; choose another --name, or delete it yourself"
        )


def _check_changeable(found: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> None:
    if found is None:
        return
    fixed = [key for key in _FIXED if found.get(key, wanted[key]) != wanted[key]]
    if bool(found.get("cpu")) != ("cpu" in wanted):
        fixed.append("gpu or cpu")
    if fixed:
        raise ConflictError(
            f"endpoint {found['name']!r} ({found['id']}) differs in {', '.join(fixed)}, which RunPod cannot change:"
            " delete it first (--delete), or choose another --name"
        )


def _bring(
    client: Client,
    place: tuple[str, str],
    kind: str,
    found: Mapping[str, Any] | None,
    wanted: Mapping[str, Any],
    creating: Mapping[str, Any],
) -> tuple[str, Step]:
    """Bring one resource to ``wanted``; its id, and what was done. ``creating`` is the body that creates it."""
    path, name = place[0], wanted["name"]
    if found is None:
        created = _created(client, path, creating)
        return created, Step(kind, name, created, "created")
    identity = str(found["id"])
    changes = {key: value for key, value in wanted.items() if not _equal(key, found.get(key), value)}
    if not changes:
        return identity, Step(kind, name, identity, "unchanged")
    client.request("PATCH", f"{path}/{segment(identity)}", changes)
    return identity, Step(kind, name, identity, "updated", tuple(sorted(changes)))


def _created(client: Client, path: str, body: Mapping[str, Any]) -> str:
    """Create a resource; its id. Raises DeployError for an answer that has none."""
    answer = client.request("POST", path, body)
    if not isinstance(answer, dict) or not answer.get("id"):
        raise DeployError(
            f"POST {client.base_url}{path}: the answer has no id; the same command again finds what was made"
        )
    return str(answer["id"])


def _equal(key: str, found: Any, wanted: Any) -> bool:
    """Whether a field is what is wanted. RunPod adds keys to settings, though not to ``env``; its lists have no order."""
    return bool(found == wanted) if key == "env" else _holds(found, wanted)


def _holds(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict):
        return isinstance(found, dict) and all(_holds(found.get(key), value) for key, value in wanted.items())
    if isinstance(wanted, list):
        there = found or []
        return len(there) == len(wanted) and all(any(_holds(each, item) for each in there) for item in wanted)
    return bool(found == wanted) or (wanted is None and not found)
