"""Signatures of refs and manifests: who made a generation, and that nothing of it was changed since.

A manifest names every blob by its hash and holds the hash of every chunk, so its signature covers the whole generation.
What is signed is the document as it is stored, with an empty signature in it, after a line that says what it is
and under which key it is stored: a manifest cannot be passed off as another generation's, nor a ref as another snapshot's.

A signature is ``ed25519:<id of the key>:<base64>``. Several keys may be good at a time, so that they can be replaced
one after another; whoever signs trusts what the same key has signed. A valid ref of yesterday stays valid: a
minimum generation refuses it.

Without a key nothing is checked and ``cryptography`` is not imported (50 ms).
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from coldstart.errors import ConfigError
from coldstart.manifest import manifest_to_json, ref_key, ref_to_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from coldstart.config import Settings
    from coldstart.manifest import Manifest, Ref

OFF, WARN, REQUIRE = POLICIES = ("off", "warn", "require")
SIGNING_PREFIX, VERIFYING_PREFIX = "csk_", "cvk_"
"""What our keys begin with, so that one is not taken for the other, and a stray one is known for what it is."""

_TEXT_OF_KEY = "[A-Za-z0-9_-]{43}"
SIGNING_KEY_FORM = SIGNING_PREFIX + _TEXT_OF_KEY
_SIGNATURE = re.compile(r"ed25519:([0-9a-f]{16}):([A-Za-z0-9_-]{86})\Z")
_MOST_FILE_BYTES = 4096
_MISSING_PACKAGE = 'signatures need the package cryptography: pip install "coldstart-gpu[signing]"'

_Document = TypeVar("_Document", "Manifest", "Ref")


class KeyPair(NamedTuple):
    """A new pair of keys as texts: ``signing`` is secret, ``verifying`` is for everybody. The repr hides the first."""

    signing: str
    verifying: str

    def __repr__(self) -> str:
        return f"KeyPair(signing='****', verifying={self.verifying!r})"


def new_keys() -> KeyPair:
    """Make a pair of keys. Raises ConfigError where ``cryptography`` is missing."""
    key = _ed25519().Ed25519PrivateKey.generate()
    signing = SIGNING_PREFIX + _encoded(key.private_bytes_raw())
    return KeyPair(signing, verifying_key_of(signing))


def verifying_key_of(signing_key: str) -> str:
    """The public half of a signing key. Raises ConfigError."""
    return VERIFYING_PREFIX + _encoded(_private(signing_key).public_key().public_bytes_raw())


def key_id(verifying_key: str) -> str:
    """Sixteen hex digits that name a public key in signatures and to people. Raises ConfigError."""
    from hashlib import sha256

    return sha256(_key_bytes(verifying_key, VERIFYING_PREFIX)).hexdigest()[:16]


class Verdict(NamedTuple):
    """Whether a document's signature was looked at and is right; what stands against using it, "" if nothing does."""

    is_good: bool
    objection: str


class Seals:
    """Signs what is written and checks what is read, by one policy. Thread-safe once made.

    ``off`` checks nothing; ``warn`` tells what is wrong and lets it pass; ``require`` refuses. Without any key to check
    with, the policy has nothing to work on. Generations below ``minimum_generation`` are refused by every policy.
    """

    def __init__(
        self,
        *,
        policy: str = REQUIRE,
        signing_key: str = "",
        verifying_keys: tuple[str, ...] = (),
        minimum_generation: int = 0,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self.minimum_generation = minimum_generation
        self._signing_key = signing_key
        self._verifying_keys = verifying_keys
        self._policy = policy if signing_key or verifying_keys else OFF
        self._warn = warn or (lambda _: None)
        self._public: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"Seals(policy={self._policy!r}, signs={bool(self._signing_key)})"

    @property
    def checks(self) -> bool:
        """Whether signatures are looked at."""
        return self._policy != OFF

    @property
    def refuses_own(self) -> bool:
        """Whether what this process would write is refused by all that read like it: it has no key to sign with."""
        return self._policy == REQUIRE and not self._signing_key

    @property
    def verifying_keys(self) -> tuple[str, ...]:
        """The public keys whose signatures are good, that of the signing key first. Raises ConfigError."""
        own = (verifying_key_of(self._signing_key),) if self._signing_key else ()
        return tuple(dict.fromkeys((*own, *self._verifying_keys)))

    def signed_manifest(self, manifest: Manifest, key: str) -> Manifest:
        """The manifest with a signature for the object key that it will be stored under, if there is a signing key."""
        return self._signed(manifest, manifest_to_json, key)

    def signed_ref(self, ref: Ref) -> Ref:
        """The ref with a signature, if there is a signing key. Raises ConfigError."""
        return self._signed(ref, ref_to_json, ref_key(ref.name, ref.key.digest))

    def check(self, document: Manifest | Ref, data: bytes, key: str) -> Verdict:
        """Judge a document that was read as ``data`` from object ``key``; with policy ``warn``, tell what is wrong."""
        if document.generation < self.minimum_generation:
            return Verdict(
                False,
                f"{key} is of generation {document.generation}, below COLDSTART_MINIMUM_GENERATION"
                f" ({self.minimum_generation}): the store was set back, or the number is another snapshot's",
            )
        wrong = self._wrong(document.signature, data, key) if self.checks else ""
        if wrong and self._policy == WARN:
            self._warn(f"{wrong}; it is used all the same (COLDSTART_SIGNATURES=warn)")
            return Verdict(False, "")
        return Verdict(self.checks and not wrong, wrong)

    def _signed(self, document: _Document, to_json: Callable[[_Document], bytes], key: str) -> _Document:
        if not self._signing_key:
            return document
        private = _private(self._signing_key)
        placeholder = os.urandom(16).hex()  # its place in the text is found by it, so nothing else may look like it
        data = to_json(document._replace(signature=placeholder))
        signature = private.sign(_message(data, placeholder, key))
        key_name = key_id(VERIFYING_PREFIX + _encoded(private.public_key().public_bytes_raw()))
        return document._replace(signature=f"ed25519:{key_name}:{_encoded(signature)}")

    def _wrong(self, signature: str, data: bytes, key: str) -> str:
        """What is wrong with a signature; "" if it is right."""
        if not signature:
            return f"{key} is not signed"
        found = _SIGNATURE.match(signature)
        if found is None:
            return f"{key} has a signature of an unknown kind"
        try:
            from cryptography.exceptions import InvalidSignature

            public = self._public_keys().get(found[1])
        except (ImportError, ConfigError) as error:
            reason = _MISSING_PACKAGE if isinstance(error, ImportError) else error
            return f"the signature of {key} cannot be checked: {reason}"
        if public is None:
            return f"{key} is signed with key {found[1]}, which is none of COLDSTART_VERIFY_KEYS"
        try:
            public.verify(_decoded(found[2]), _message(data, signature, key))
        except (InvalidSignature, ValueError):
            return f"{key} was changed after it was signed, or was moved there from elsewhere"
        return ""

    def _public_keys(self) -> dict[str, Any]:
        """Id -> key, of all that are trusted. Raises ConfigError."""
        if not self._public:
            from_bytes = _ed25519().Ed25519PublicKey.from_public_bytes
            self._public = {
                key_id(text): from_bytes(_key_bytes(text, VERIFYING_PREFIX)) for text in self.verifying_keys
            }
        return self._public


def are_required(settings: Settings) -> bool:
    """Whether every snapshot that is used has been verified by then, so that code in it may be executed."""
    has_key = bool(settings.verify_keys or settings.signing_key or settings.signing_key_file)
    return has_key and settings.signatures == REQUIRE


def seals_of(settings: Settings, warn: Callable[[str], None] | None = None) -> Seals:
    """What the settings say of signatures. Raises ConfigError for a key file that cannot be read, or holds no key."""
    signing_key = settings.signing_key or (_read_key(settings.signing_key_file) if settings.signing_key_file else "")
    return Seals(
        policy=settings.signatures,
        signing_key=signing_key,
        verifying_keys=tuple(text.strip() for text in settings.verify_keys.split(",") if text.strip()),
        minimum_generation=settings.minimum_generation,
        warn=warn,
    )


def _read_key(path: str) -> str:
    """A signing key from a file, of which no error shows anything."""
    try:
        with open(path, "rb") as file:
            text = file.read(_MOST_FILE_BYTES).decode("ascii", "replace").strip()
    except OSError as error:
        raise ConfigError(f"COLDSTART_SIGNING_KEY_FILE={path!r} cannot be read: {error.strerror}") from error
    if not re.fullmatch(SIGNING_KEY_FORM, text):
        raise ConfigError(f"COLDSTART_SIGNING_KEY_FILE={path!r} holds no signing key: coldstart keys new makes one")
    return text


def _message(data: bytes, signature: str, key: str) -> bytes:
    """What is signed: the key, and the document without its signature. Raises ValueError where it is not there once."""
    field = b'"signature":"%s"' % signature.encode()
    if data.count(field) != 1:
        raise ValueError("the document does not hold its signature as coldstart writes it")
    return b"coldstart %s\n%s" % (key.encode(), data.replace(field, b'"signature":""'))


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise ConfigError(_MISSING_PACKAGE) from error
    return ed25519


def _private(signing_key: str) -> Any:
    return _ed25519().Ed25519PrivateKey.from_private_bytes(_key_bytes(signing_key, SIGNING_PREFIX))


def _key_bytes(text: str, prefix: str) -> bytes:
    """The bytes of one of our keys. Raises ConfigError, which does not show it."""
    if not text.startswith(prefix) or not re.fullmatch(_TEXT_OF_KEY, text[len(prefix) :]):
        raise ConfigError(f"this is no key that begins with {prefix}: coldstart keys new makes a pair")
    return _decoded(text[len(prefix) :])


def _encoded(data: bytes) -> str:
    from base64 import urlsafe_b64encode

    return urlsafe_b64encode(data).rstrip(b"=").decode()


def _decoded(text: str) -> bytes:
    from base64 import urlsafe_b64decode

    return urlsafe_b64decode(text + "=" * (-len(text) % 4))
