"""The environment that workers get from the one that deploys them: the store's settings, and which of them are secret."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coldstart import config

if TYPE_CHECKING:
    from collections.abc import Mapping

STORE_FIELDS = frozenset(
    ("store", "endpoint_url", "region", "access_key_id", "secret_access_key", "session_token", "r2_account_id")
)


def store_variables(environment: Mapping[str, str]) -> tuple[dict[str, str], set[str]]:
    """The store's settings under coldstart's own names, and which of them are secret. Raises ConfigError."""
    found = config.given(environment)
    settings = [setting for setting in config.SETTINGS if setting.field in STORE_FIELDS & found.keys()]
    for setting in settings:
        config.read(setting, found[setting.field])
    variables = {setting.variable: found[setting.field].text for setting in settings}
    if not variables.get("COLDSTART_STORE", "").startswith(("s3://", "r2://")):
        return {name: text for name, text in variables.items() if name == "COLDSTART_STORE"}, set()
    return variables, {setting.variable for setting in settings if setting.secret}
