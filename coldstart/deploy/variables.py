"""The environment that workers get from the one that deploys them, and what is looked at before anything is sent."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coldstart import config
from coldstart.errors import ConfigError, HandlerError

if TYPE_CHECKING:
    from collections.abc import Container, Mapping

    from coldstart.deploy.shape import HandlerShape
    from coldstart.script import Script

_PLACE_FIELDS = ("endpoint_url", "region", "access_key_id", "secret_access_key", "session_token")
STORE_FIELDS = frozenset(
    (
        *("store", "r2_account_id", "store_replicas", "store_copies", "recovery"),
        *_PLACE_FIELDS,
        *(f"replica_{field}" for field in _PLACE_FIELDS),
        *("trust_store", "signatures", "verify_keys", "signing_key", "minimum_generation"),
    )
)
_REMOTE = ("s3://", "r2://")
_REPLICAS = "COLDSTART_STORE_REPLICAS"


def store_variables(environment: Mapping[str, str]) -> tuple[dict[str, str], set[str]]:
    """The store's settings under coldstart's own names, and which of them are secret. Raises ConfigError.

    Of its replicas those that workers elsewhere can reach.
    """
    found = config.given(environment)
    settings = [setting for setting in config.SETTINGS if setting.field in STORE_FIELDS & found.keys()]
    for setting in settings:
        config.read(setting, found[setting.field])
    variables = {setting.variable: found[setting.field].text for setting in settings}
    if not variables.get("COLDSTART_STORE", "").startswith(_REMOTE):
        return {name: text for name, text in variables.items() if name == "COLDSTART_STORE"}, set()
    remote = [each for each in variables.pop(_REPLICAS, "").split(",") if each.startswith(_REMOTE)]
    if remote:
        variables[_REPLICAS] = ",".join(remote)
    return variables, {setting.variable for setting in settings if setting.secret}


def check_not_written(shape: HandlerShape, script: Script, remedy: str) -> None:
    """Raise HandlerError for a secret whose value stands in the handler's file. ``remedy``: where else it may be."""
    secret = {*shape.secrets, *(setting.variable for setting in config.SETTINGS if setting.secret)}
    written = sorted(secret & {*script.env})
    if written:
        raise HandlerError(
            f"{', '.join(written)} is secret and stands in tool.coldstart.env: take it out of the file; set it where you"
            f" deploy, {remedy}"
        )


def check_access(address: str, variables: Container[str], remedy: str) -> None:
    """Raise ConfigError where workers could not reach the store: they have no credentials but those they are given."""
    needed = [
        ("COLDSTART_ACCESS_KEY_ID", "AWS_ACCESS_KEY_ID"),
        ("COLDSTART_SECRET_ACCESS_KEY", "AWS_SECRET_ACCESS_KEY"),
    ]
    if address.startswith("r2://"):
        needed.append(("COLDSTART_R2_ACCOUNT_ID", "COLDSTART_ENDPOINT_URL"))
    missing = [" or ".join(names) for names in needed if not any(name in variables for name in names)]
    if missing:
        raise ConfigError(
            f"workers could not reach {address} without {', '.join(missing)}: set them where you deploy, {remedy}"
        )


def notes(variables: Container[str], *, elsewhere: Container[str] = ()) -> tuple[str, ...]:
    """What whoever deploys should know. ``elsewhere``: variables whose values the platform has."""
    found = []
    if "COLDSTART_SESSION_TOKEN" in variables and "COLDSTART_SESSION_TOKEN" not in elsewhere:
        found.append("the store's credentials are temporary: workers lose the store when they expire")
    return tuple(found)


NO_DEPENDENCIES = "the file names no dependencies (PEP 723), so the image has none but coldstart's own"
"""What is said where an image is built from a file without any."""
