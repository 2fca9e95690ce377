"""Taking secrets out of what people read: log lines, start records, errors of other libraries.

Two ways, and both are used. *By value*: what this process has as secrets (its settings, variables whose names say so) is
blotted out wherever it stands, in each form in which it may be written. *By shape*: what looks like a credential is,
whoever's it is: signatures and tokens of AWS in URLs and headers, users in URLs, keys of known kinds, ``secret=value``.

Nothing here knows every secret. Texts of our own have none; this is for those that are not ours.
Standard library only, and never on the way to the first answer.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from coldstart.terms import MASK

if TYPE_CHECKING:
    from collections.abc import Iterable

LEAST_CHARACTERS = 8
"""Shorter values are nobody's secret, and would blot out ordinary words."""

_NAME = (
    r"(?:secret|token|passw(?:or)?d|passphrase|authorization|credentials?|signature|cookie"
    r"|(?:api|access|private|signing|session|secret|account)[-_]?key)(?:[-_]?id)?"
)
_VALUE = r"""(?:"[^"]*"|'[^']*'|[^\s"'&,;<>(){}\[\]]+)"""

_SHAPES = (
    (r"AWS4-HMAC-SHA256(?:[ ,]+[A-Za-z]+=[^\s,\"']+)+", False, f"AWS4-HMAC-SHA256 {MASK}"),
    (r"(x-amz-(?:signature|credential|security-token)(?:=|%3D))[^&\s\"'<>]+", True, rf"\g<1>{MASK}"),
    (r"(?<=://)[^/\s@\"'<>]+@", False, f"{MASK}@"),
    (r"\b(bearer|basic)[ ]+(?=\S*\d)[A-Za-z0-9._~+/=-]{8,}", True, rf"\g<1> {MASK}"),
    (
        rf"\b((?:proxy-)?authorization|x-amz-security-token|x-api-key|(?:set-)?cookie)(\s*:\s*)(?!\s|{re.escape(MASK)})[^\n\"']+",
        True,
        rf"\g<1>\g<2>{MASK}",
    ),
    (rf"((?<![A-Za-z])[A-Za-z0-9_.-]{{0,64}}{_NAME}(?:[\"']\s*:\s*|\s*=\s*)){_VALUE}", True, rf"\g<1>{MASK}"),
    (r"\b(?:rpa_|hf_|csk_|gh[pousr]_|github_pat_)[A-Za-z0-9_-]{16,}", False, MASK),
    (r"\b(?:ak-|as-|wk-|ws-)[A-Za-z0-9]{16,}", False, MASK),
    (r"\bsk-(?:[a-z]+-)?[A-Za-z0-9_]{16,}", False, MASK),
    (r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b", False, MASK),
    (r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*)?", False, MASK),
)
"""Pattern, whether upper and lower case are one, replacement. Compiled by the first text that is not ours."""


def is_secret_name(name: str) -> bool:
    """Whether a field or variable of this name holds a secret: ``api_key``, ``HF_TOKEN``; not ``tokens``, ``key_file``."""
    return re.fullmatch(f".*{_NAME}", name, re.IGNORECASE | re.DOTALL) is not None


def without_shapes(text: str) -> str:
    """``text`` without what looks like a credential, whoever's it is."""
    for pattern, folded, replacement in _SHAPES:
        text = re.sub(pattern, replacement, text, flags=re.IGNORECASE if folded else 0)
    return text


class Redactor:
    """Takes ``secrets`` by value, and credentials by shape, out of texts and values."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        forms = {form for text in secrets if len(text) >= LEAST_CHARACTERS for form in _written_forms(text)}
        self._forms = tuple(sorted(forms, key=len, reverse=True))

    def by_value(self, text: str) -> str:
        """``text`` without the secrets that are known."""
        for form in self._forms:
            text = text.replace(form, MASK)
        return text

    def text(self, text: str) -> str:
        """``text`` without any secret, known or of a known shape."""
        return without_shapes(self.by_value(text))

    def value(self, value: Any) -> Any:
        """A copy of a JSON-like value: texts under names of secrets are masked, all others as ``text`` has them."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.value(name): self._field(name, item) for name, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(map(self.value, value))
        if value is None or isinstance(value, (bool, int, float)):
            return value
        shown = f"{type(value).__name__}: {value}" if isinstance(value, BaseException) else str(value)
        clean = self.text(shown)
        return value if clean == shown else clean

    def _field(self, name: object, item: Any) -> Any:
        hides = isinstance(name, str) and is_secret_name(name) and isinstance(item, (str, bytes)) and len(item) > 0
        return MASK if hides else self.value(item)


def _written_forms(text: str) -> tuple[str, ...]:
    """How ``text`` may look: as it is, in a URL, inside a repr, inside a repr that escapes quotes, inside JSON."""
    from urllib.parse import quote

    escaped = text.replace("\\", "\\\\")
    return text, quote(text, safe=""), escaped, escaped.replace("'", "\\'"), escaped.replace('"', '\\"')
