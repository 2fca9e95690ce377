"""The table of settings as a strict pydantic model: every wrong value at once, for ``coldstart config``.

It checks texts by pydantic's own rules, so it is also the oracle that the tests hold the light reader of
``coldstart.config`` against. pydantic is imported when the model is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coldstart.config import SETTINGS, Given, explain
from coldstart.terms import PHASES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic import BaseModel

    from coldstart.setting_kinds import Kind


def strict_model() -> type[BaseModel]:
    """A pydantic model of the table: fields take the texts that variables have, and check them by pydantic's own rules.

    Fields that are not given are None. Values of the others are those that ``config.load`` gives.
    """
    import pydantic

    fields: dict[str, Any] = {setting.field: (_annotation(setting.kind), None) for setting in SETTINGS}
    rules = pydantic.ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)
    return pydantic.create_model("StrictSettings", __config__=rules, **fields)


def problems(found: Mapping[str, Given]) -> dict[str, str]:
    """Field -> why its text cannot be used, for every wrong one of what ``given`` returned."""
    import pydantic

    try:
        strict_model().model_validate({field: text for field, (text, _) in found.items()})
    except pydantic.ValidationError as error:
        settings = {setting.field: setting for setting in SETTINGS}
        wrong = dict.fromkeys(str(detail["loc"][0]) for detail in error.errors(include_input=False, include_url=False))
        return {field: explain(settings[field], found[field]) for field in wrong}
    return {}


def _annotation(kind: Kind) -> Any:
    from typing import Annotated, Literal

    from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, StringConstraints, TypeAdapter

    form = StringConstraints(pattern=f"^(?:{kind.pattern})$", strict=True)
    literal: Any = Literal
    if kind.name == "flag":
        return bool
    if kind.name == "choice":
        return Annotated[literal[kind.words], BeforeValidator(str.lower)]
    if kind.name == "phases":
        split = BeforeValidator(lambda text: tuple(word.strip(" ") for word in text.lower().split(",")))
        return Annotated[
            tuple[literal[kind.words], ...],
            split,
            AfterValidator(lambda named: tuple(sorted(set(named), key=PHASES.index))),
        ]
    if kind.limits is None:
        return Annotated[str, form]
    low, high = kind.limits
    number: Any = {"whole": int, "size": ByteSize, "seconds": float}[kind.name]
    ranged = TypeAdapter(Annotated[number, Field(ge=low, le=high)])
    return Annotated[str, BeforeValidator(str.lower), form, AfterValidator(ranged.validate_python)]
