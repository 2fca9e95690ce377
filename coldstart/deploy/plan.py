"""What a deployed handler is to be on RunPod: the exact bodies of its template and its endpoint (REST v2). Pure.

The endpoint is a queue endpoint. Its container settings (image, environment, disk, registry credential) are the
template's, which RunPod copies when the endpoint is created, and never again.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart import config
from coldstart.deploy.variables import check_access, check_not_written, notes, store_variables
from coldstart.errors import ConfigError, HandlerError
from coldstart.terms import MASK

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coldstart.deploy.shape import HandlerShape
    from coldstart.script import Script

GPU_POOLS: Mapping[str, str] = {
    "A4000": "AMPERE_16",
    "A4500": "AMPERE_16",
    "4000 Ada": "AMPERE_16",
    "2000 Ada": "AMPERE_16",
    "L4": "AMPERE_24",
    "A5000": "AMPERE_24",
    "3090": "AMPERE_24",
    "4090": "ADA_24",
    "5090": "ADA_32_PRO",
    "A40": "AMPERE_48",
    "A6000": "AMPERE_48",
    "L40": "ADA_48_PRO",
    "L40S": "ADA_48_PRO",
    "6000 Ada": "ADA_48_PRO",
    "A100": "AMPERE_80",
    "A100-80GB": "AMPERE_80",
    "H100": "ADA_80_PRO",
    "PRO 6000": "BLACKWELL_96",
    "H200": "HOPPER_141",
    "B200": "BLACKWELL_180",
}
"""A GPU's name -> the RunPod pool that has it. A pool may have other cards of the same size too.

Names are compared without case, spaces, signs and the words NVIDIA, GeForce and RTX, so "RTX 4090" is "4090".
"""

CPU_FLAVORS = ("cpu5c", "cpu3c")
CPU_COUNT = 4
"""Where workers of a handler without a GPU run: any of these flavors, with this many vCPUs."""

MARK = "COLDSTART_HANDLER"
"""The variable that every endpoint of ours has. One without it was made by somebody else and is left alone."""

VOLUME_FOLDER = "/runpod-volume"
"""Where a network volume is mounted in workers."""

_REMEDY = "or name RunPod secrets in [tool.coldstart.runpod.secrets]"
_QUEUE_DELAY_SECONDS = 4
_FLASHBOOT = {"off": "OFF", "on": "FLASHBOOT", "priority": "PRIORITY_FLASHBOOT"}
_MOST_NAME_CHARACTERS = 100


class Plan(NamedTuple):
    """What is to be there. ``template`` is the body that creates it; ``endpoint`` is without its container settings."""

    template: Mapping[str, Any]
    endpoint: Mapping[str, Any]
    secret_names: frozenset[str]
    """Variables whose values nobody may see."""
    notes: tuple[str, ...]
    """What whoever deploys should know."""

    @property
    def hidden(self) -> tuple[str, ...]:
        """The values that nobody may see."""
        return tuple(self.template["env"][name] for name in sorted(self.secret_names))

    def shown(self, body: Mapping[str, Any] | None) -> Any:
        """A request's body as people may see it: secret values as ``****``."""
        if not body or "env" not in body:
            return body
        env = {name: MASK if name in self.secret_names else value for name, value in body["env"].items()}
        return {**body, "env": env}


def template_name(name: str) -> str:
    """The name of the template of endpoint ``name``."""
    return f"coldstart-{name}"


def make_plan(
    shape: HandlerShape,
    script: Script,
    image: str,
    *,
    environment: Mapping[str, str],
    name: str = "",
    allow_local_store: bool = False,
) -> Plan:
    """The plan that deploys a handler from ``image``, with the values that ``environment``, the deploying one, has.

    ``name``: the endpoint's; the default is the handler's. Raises HandlerError or ConfigError for what cannot work,
    missing secrets all in one message.
    """
    name = _checked_name(name or shape.name)
    variables = _Variables(shape, script, environment)
    _check_store(variables.all, script, allow_local_store=allow_local_store)
    template = {
        "name": template_name(name),
        "image": image,
        "serverless": True,
        "disk": script.runpod.disk_gb,
        "env": dict(sorted(variables.all.items())),
        "registry": script.runpod.registry or None,
    }
    endpoint = {
        "name": name,
        "type": "QUEUE",
        **_compute(script),
        "workers": {"min": script.min_workers, "max": script.max_workers, "idleTimeout": script.idle_seconds},
        "scaling": {"type": "QUEUE_DELAY", "queueDelay": _QUEUE_DELAY_SECONDS},
        "flashboot": _FLASHBOOT[script.runpod.flashboot],
        "networkVolumes": list(script.runpod.network_volumes),
        "dataCenterIds": list(script.runpod.data_centers),
        "timeout": script.timeout_seconds * 1000,
    }
    return Plan(template, endpoint, variables.secret_names, variables.notes)


def pool_of(gpu: str) -> str:
    """The RunPod pool of a GPU's name. Raises HandlerError, listing the known ones."""
    wanted = _plain(gpu)
    for known, pool in GPU_POOLS.items():
        if _plain(known) == wanted:
            return pool
    raise HandlerError(
        f"RunPod has no pool for GPU {gpu!r} that is known here (known: {', '.join(GPU_POOLS)}); use one of these, or"
        ' name pools in [tool.coldstart.runpod], such as gpu = ["ADA_24"]'
    )


def _plain(gpu: str) -> str:
    return re.sub(r"NVIDIA|GEFORCE|RTX|[^A-Z0-9]", "", gpu.upper())


def _compute(script: Script) -> dict[str, Any]:
    pools = script.runpod.gpu or tuple(dict.fromkeys(map(pool_of, script.gpu)))
    if pools:
        return {"gpu": {"pools": list(pools), "count": script.gpu_count}}
    return {"cpu": [{"id": flavor, "vcpuCount": CPU_COUNT} for flavor in CPU_FLAVORS]}


def _checked_name(name: str) -> str:
    if not name.isprintable() or name != name.strip() or not 0 < len(name) <= _MOST_NAME_CHARACTERS:
        raise ConfigError(f"{name!r} cannot name an endpoint: use 1 to {_MOST_NAME_CHARACTERS} printable characters")
    return name


# --- the environment of workers --------------------------------------------------------------------------------------


class _Variables:
    """The workers' environment, and which of it is secret.

    From the weakest: what ``env=`` declares, where the deploying environment has it; the store's settings; the block's
    ``env``; values of ``secrets=``; references to RunPod's own secrets; ours.
    """

    def __init__(self, shape: HandlerShape, script: Script, environment: Mapping[str, str]) -> None:
        references = {
            variable: f"{{{{ RUNPOD_SECRET_{secret} }}}}" for variable, secret in script.runpod.secrets.items()
        }
        check_not_written(shape, script, _REMEDY)
        store, store_secrets = store_variables({**environment, **script.env})
        secrets = _secret_values(shape, references, environment)
        ours = {MARK: shape.name}
        if script.concurrency:
            ours["COLDSTART_CONCURRENCY"] = str(script.concurrency)
        declared = {name: environment[name] for name in shape.env if name in environment}
        self.all: dict[str, str] = {**declared, **store, **script.env, **secrets, **references, **ours}
        self.secret_names = frozenset({*secrets, *store_secrets} - {*references, *script.env})
        self.notes = notes(self.all, elsewhere=references)


def _secret_values(
    shape: HandlerShape, references: Mapping[str, str], environment: Mapping[str, str]
) -> dict[str, str]:
    missing = [name for name in shape.secrets if not environment.get(name) and name not in references]
    if missing:
        raise ConfigError(
            f"handler {shape.name!r} needs the secrets {', '.join(missing)}: set them where you deploy, {_REMEDY}"
        )
    return {name: environment[name] for name in shape.secrets if name not in references}


def _check_store(variables: Mapping[str, str], script: Script, *, allow_local_store: bool) -> None:
    address = variables.get("COLDSTART_STORE", "")
    if address.startswith(("s3://", "r2://")):
        check_access(address, variables, _REMEDY)
    elif address != config.OFF and not allow_local_store:
        _check_folder(address, script)


def _check_folder(address: str, script: Script) -> None:
    """A store in a folder is of use only where workers share the folder."""
    if f"{address.removeprefix('file://')}/".startswith(f"{VOLUME_FOLDER}/"):
        if not script.runpod.network_volumes:
            raise ConfigError(
                f"COLDSTART_STORE={address} is on a network volume, and the endpoint has none: name it in"
                " [tool.coldstart.runpod], network_volumes = [...]"
            )
        return
    what = f"COLDSTART_STORE={address} is a folder of each worker's own" if address else "COLDSTART_STORE is not set"
    raise ConfigError(
        f"{what}, so no worker would find another's snapshot: set COLDSTART_STORE to r2://bucket/prefix or"
        f" s3://bucket/prefix, to a folder of a network volume ({VOLUME_FOLDER}/...), or to off; or give"
        " --allow-local-store"
    )
