"""``coldstart config``: every setting, its value, and where the value came from."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from coldstart import config

if TYPE_CHECKING:
    import argparse

_WRONG = 2
"""Exit status for settings that cannot be used: that of a wrong command line."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "config",
        help="show every setting, its value and where it came from",
        description="Show every setting, its value (secrets masked) and where it came from; check them all.",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as one JSON object")
    form.add_argument(
        "--reference", action="store_true", help="what can be set, as a Markdown table, instead of values"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the settings; complaints go to standard error. Returns 0, or 2 where a value cannot be used."""
    if arguments.reference:
        print(reference())
        return 0
    from coldstart.strict_settings import problems

    found = config.given()
    wrong = problems(found)
    rows = [_row(setting, found, wrong) for setting in config.SETTINGS]
    if not wrong:
        config.load()  # what only the whole of them can break: half a pair of credentials
    unknown = config.unknown_variables()
    if arguments.json:
        report = {
            "platform": config.platform_name(),
            "settings": rows,
            "problems": wrong,
            "unknown": [name._asdict() for name in unknown],
        }
        print(json.dumps(report, indent=2))
    else:
        print(_table(rows))
        for complaint in (*wrong.values(), *map(str, unknown)):
            print(f"coldstart: {complaint}", file=sys.stderr)
    return _WRONG if wrong else 0


def reference() -> str:
    """What can be set, as a Markdown table."""
    lines = ["| variable | default | allowed | what it does |", "| --- | --- | --- | --- |"]
    for setting in config.SETTINGS:
        names = ", else ".join(f"`{name}`" for name in (setting.variable, *setting.also))
        default = _text(setting.default).replace("{cache}", "~/.cache")
        lines.append(f"| {names} | {f'`{default}`' if default else ''} | {setting.kind.allowed} | {setting.doc} |")
    return "\n".join(lines)


def _row(setting: config.Setting, found: dict[str, config.Given], wrong: dict[str, str]) -> dict[str, Any]:
    if setting.field not in found:
        value, source = config.default_of(setting), config.Source(config.DEFAULT)
    else:
        text, source = found[setting.field]
        value = text if setting.field in wrong else setting.kind.read(text)
    return {
        "setting": setting.field,
        "value": config.show(setting, value),
        "source": source.kind,
        "variable": source.variable or setting.variable,
        "usable": setting.field not in wrong,
        "doc": setting.doc,
    }


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [("setting", "value", "source"), ("platform", config.platform_name(), "detected")]
    for row in rows:
        source = row["variable"] if row["source"] == config.ENVIRONMENT else row["source"]
        lines.append((row["setting"], _text(row["value"]), source if row["usable"] else f"{source} (cannot be used)"))
    widths = [max(len(line[column]) for line in lines) for column in (0, 1)]
    return "\n".join(f"{name:{widths[0]}}  {value:{widths[1]}}  {source}".rstrip() for name, value, source in lines)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return ",".join(value) if isinstance(value, tuple) else str(value)
