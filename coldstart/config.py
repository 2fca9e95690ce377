"""Settings: what can be set, how it is read, and where each value came from. The only reader of the environment.

``SETTINGS`` is the one table. Reading, error messages, ``coldstart config`` with its reference, and the pydantic model
of ``strict_settings`` are all derived from it.

Who wins: an override given in code or on the command line, then the setting's own ``COLDSTART_*`` variable, then (for
region and credentials) the ``AWS_*`` names, then the default. A variable that is empty counts as not set, and white
space around a value is dropped. Credentials are never mixed: once one of the three is ours, no ``AWS_*`` name is looked
at for the other two.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart import setting_kinds as kinds
from coldstart.errors import ConfigError
from coldstart.recovery import MODES, STANDARD
from coldstart.terms import MASK

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from coldstart.redaction import Redactor

DEFAULT, ENVIRONMENT, OVERRIDE = "default", "environment", "override"
OFF = "off"
_PREFIX = "COLDSTART_"
_SHOWN_SECRET = re.compile("(?<=//).*(?=@)|csk_[A-Za-z0-9_-]+")
"""Credentials in an address, and a signing key where a public one should be."""
_NOT_SETTINGS = frozenset({"HANDLER"})
"""Variables of ours that no setting reads: the name of a deployed image's handler, for its command and its platform."""


class Source(NamedTuple):
    """Where a value came from: ``kind`` is default, environment or override; ``variable`` is "" unless environment."""

    kind: str
    variable: str = ""


class Given(NamedTuple):
    """The text that a setting was given, before it is read."""

    text: str
    source: Source


class Setting(NamedTuple):
    """One line of the table. ``{cache}`` in a default stands for the user's cache folder."""

    field: str
    variable: str
    kind: kinds.Kind
    default: Any
    doc: str
    secret: bool = False
    also: tuple[str, ...] = ()


def _setting(
    field: str, kind: kinds.Kind, default: Any, doc: str, *, secret: bool = False, also: tuple[str, ...] = ()
) -> Setting:
    return Setting(field, _PREFIX + field.upper(), kind, default, doc, secret, also)


_ADDRESS = kinds.text(
    rf"off|{kinds.PATH}|[a-z][a-z0-9+.-]{{0,30}}://[^/@:\x00- \x7f]*({kinds.PATH})?",
    "an address without credentials (file:///folder, /folder, s3://bucket/prefix, r2://bucket/prefix), or off",
    optional=False,
)
_REPLICA = r"(/[^,\x00-\x1f\x7f]*|[a-z][a-z0-9+.-]{0,30}://[^/@:,\x00- \x7f]*(/[^,\x00-\x1f\x7f]*)?)"
_REPLICAS = kinds.text(f"{_REPLICA}(,{_REPLICA})*", "addresses without credentials, a comma between two")
_FOLDER = kinds.text(kinds.PATH, "an absolute path", optional=False)
_CACHE = kinds.text(kinds.PATH, "an absolute path")
_DEVICE = kinds.text("auto|cpu|cuda(:[0-9]{1,2})?", "auto, cpu, cuda or cuda:<number>", optional=False)
_ENDPOINT = kinds.text(
    r"https?://[A-Za-z0-9._:\[\]-]{1,300}(/[A-Za-z0-9._~/-]*)?", "http(s)://host[:port] without credentials or query"
)
_REGION = kinds.text("[A-Za-z0-9-]{1,64}", "a region's name, such as us-east-1 or auto")
_ACCOUNT = kinds.text("[A-Za-z0-9]{1,64}", "letters and digits")
_PUBLIC_KEYS = kinds.text(
    "cvk_[A-Za-z0-9_-]{43}( *, *cvk_[A-Za-z0-9_-]{43}){0,15}", "up to 16 keys that begin with cvk_, comma-separated"
)
_SIGNING_KEY = kinds.text("csk_[A-Za-z0-9_-]{43}", "a key that begins with csk_; coldstart keys new makes one")
_SECRET = kinds.text("[!-~]{1,16384}", "printable ASCII without spaces")

PINNED_BYTES = 256 << 20
"""Pinned memory by default: sixteen of the largest chunks."""

SETTINGS: tuple[Setting, ...] = (
    _setting("store", _ADDRESS, "file://{cache}/coldstart", "where snapshots are kept; off: nowhere"),
    _setting("store_replicas", _REPLICAS, "", "further stores that hold all snapshots too, the nearest first"),
    _setting(
        "store_copies",
        kinds.whole(1, 16),
        2,
        "stores, the first among them, that must hold a generation before it is published; with replicas",
    ),
    _setting(
        "recovery",
        kinds.choice(*MODES),
        STANDARD,
        "how far a start may go when its snapshot cannot be used",
    ),
    _setting(
        "device",
        _DEVICE,
        "auto",
        "where the state lives: cpu, cuda or cuda:<number>; auto: the first GPU that is there, else cpu",
    ),
    _setting("fresh", kinds.flag(), False, "ignore snapshots at start and make a new one"),
    _setting(
        "progress", kinds.flag(), True, "show a bar while a snapshot is fetched, where standard error is a terminal"
    ),
    _setting("log", kinds.choice("json", "console", OFF), "console", "form of the log lines on standard error"),
    _setting(
        "log_level",
        kinds.choice("debug", "info", "warning", "error"),
        "info",
        "the least severe events that are logged",
    ),
    _setting(
        "codec",
        kinds.choice("auto", "raw", "zstd", "planes+zstd", "nvcomp-ans"),
        "auto",
        "how chunks are stored; auto: by a sample of each segment; nvcomp-ans: so too, and for GPUs as ANS besides",
    ),
    _setting("zstd_level", kinds.whole(1, 19), 1, "effort of the zstd codec"),
    _setting("skip_phases", kinds.phases(), (), "phases of a start to leave out"),
    _setting(
        "fetch_engine",
        kinds.choice("auto", "process", "threads"),
        "auto",
        "who reads a snapshot; auto: a process of its own where that pays",
    ),
    _setting(
        "fetch_processes",
        kinds.whole(0, 16),
        0,
        "fetcher processes at most for a large snapshot; 0: one for every two processors, up to 4",
    ),
    _setting("fetch_threads", kinds.whole(1, 256), 64, "reads from the store at a time, at most"),
    _setting(
        "memory_budget_bytes",
        kinds.size(1 << 20, 1 << 40),
        192 << 20,
        "memory of a restore or capture beyond the state itself",
    ),
    _setting(
        "pinned_bytes",
        kinds.size(1 << 20, 1 << 36),
        PINNED_BYTES,
        "pinned host memory through which a snapshot reaches a GPU",
    ),
    _setting("capture", kinds.flag(), True, "make snapshots in the background"),
    _setting("programs", kinds.flag(), True, "make and use the programs that program=export(...) asks for"),
    _setting(
        "kernel_caches", kinds.flag(), True, "keep compiled kernels (CuPy, Triton, Inductor, driver) in snapshots"
    ),
    _setting(
        "capture_wait_seconds", kinds.seconds(86_400), 60.0, "how long the end of the process waits for a capture"
    ),
    _setting("capture_idle_seconds", kinds.seconds(86_400), 0.25, "how long no event may run before a capture begins"),
    _setting(
        "capture_engine",
        kinds.choice("auto", "process", "threads"),
        "auto",
        "who hashes, encodes and stores; auto: a process of its own where that pays",
    ),
    _setting(
        "capture_bytes_per_second", kinds.size(0, 1 << 40), 0, "how fast a capture may write to the store; 0: no limit"
    ),
    _setting(
        "concurrency", kinds.whole(0, 1000), 0, "events at a time on a platform's worker; 0: what the decorator says"
    ),
    _setting(
        "thaw_seconds",
        kinds.seconds(86_400),
        15.0,
        "a worker that stood still this long was frozen by its platform; 0: do not look",
    ),
    _setting(
        "hook_seconds",
        kinds.seconds(86_400),
        60.0,
        "how long before_snapshot and after_restore may take each, before the worker goes on without them; 0: any time",
    ),
    _setting("start_records", kinds.flag(), True, "write a record of each start to the store"),
    _setting("files_folder", _FOLDER, "{cache}/coldstart-files", "where restored files are placed"),
    _setting("cache", _CACHE, "", "folder for copies of what s3:// and r2:// stores hold; empty: no copies"),
    _setting("cache_bytes", kinds.size(1 << 20, 1 << 49), 50 << 30, "how large the cache may grow"),
    _setting("endpoint_url", _ENDPOINT, "", "the S3 endpoint, where it is not Amazon's or R2's own"),
    _setting("region", _REGION, "", "the store's region", also=("AWS_REGION", "AWS_DEFAULT_REGION")),
    _setting("access_key_id", _SECRET, "", "credential of the store", secret=True, also=("AWS_ACCESS_KEY_ID",)),
    _setting("secret_access_key", _SECRET, "", "credential of the store", secret=True, also=("AWS_SECRET_ACCESS_KEY",)),
    _setting("session_token", _SECRET, "", "credential of the store", secret=True, also=("AWS_SESSION_TOKEN",)),
    _setting("r2_account_id", _ACCOUNT, "", "the Cloudflare account of r2:// addresses"),
    _setting("replica_endpoint_url", _ENDPOINT, "", "the replicas' S3 endpoint; empty: the store's own"),
    _setting("replica_region", _REGION, "", "the replicas' region; empty: the store's own"),
    _setting("replica_access_key_id", _SECRET, "", "credential of the replicas; empty: the store's own", secret=True),
    _setting("replica_secret_access_key", _SECRET, "", "credential of the replicas", secret=True),
    _setting("replica_session_token", _SECRET, "", "credential of the replicas", secret=True),
    _setting(
        "trust_store",
        kinds.flag(),
        False,
        "execute unsigned programs and kernel caches of the store; a folder of this user's own needs no such word",
    ),
    _setting(
        "signatures",
        kinds.choice("require", "warn", OFF),
        "require",
        "what becomes of refs and manifests without a good signature, once there is a key to check with",
    ),
    _setting("verify_keys", _PUBLIC_KEYS, "", "public keys whose signatures are good, comma-separated"),
    _setting("signing_key", _SIGNING_KEY, "", "the key that signs what this worker writes", secret=True),
    _setting("signing_key_file", _CACHE, "", "the file that holds the signing key, instead of the key itself"),
    _setting(
        "minimum_generation",
        kinds.whole(0, 10**12),
        0,
        "generations of lower numbers are refused, and new ones begin with it: set it when a store was set back",
    ),
)
_BY_FIELD = {setting.field: setting for setting in SETTINGS}
_CREDENTIALS = ("access_key_id", "secret_access_key", "session_token")


class Settings(NamedTuple):
    """All settings with their values; what each means is its line in ``SETTINGS``. Texts that are not set are ""."""

    store: str
    store_replicas: str
    store_copies: int
    recovery: str
    device: str
    fresh: bool
    progress: bool
    log: str
    log_level: str
    codec: str
    zstd_level: int
    skip_phases: tuple[str, ...]
    fetch_engine: str
    fetch_processes: int
    fetch_threads: int
    memory_budget_bytes: int
    pinned_bytes: int
    capture: bool
    programs: bool
    kernel_caches: bool
    capture_wait_seconds: float
    capture_idle_seconds: float
    capture_engine: str
    capture_bytes_per_second: int
    concurrency: int
    thaw_seconds: float
    hook_seconds: float
    start_records: bool
    files_folder: str
    cache: str
    cache_bytes: int
    endpoint_url: str
    region: str
    access_key_id: str
    secret_access_key: str
    session_token: str
    r2_account_id: str
    replica_endpoint_url: str
    replica_region: str
    replica_access_key_id: str
    replica_secret_access_key: str
    replica_session_token: str
    trust_store: bool
    signatures: str
    verify_keys: str
    signing_key: str
    signing_key_file: str
    minimum_generation: int
    sources: Mapping[str, Source]
    """Field -> where its value came from."""

    @property
    def has_store(self) -> bool:
        """Whether snapshots are kept at all."""
        return self.store != OFF

    @property
    def store_is_explicit(self) -> bool:
        """Whether somebody named the store, rather than getting the default one."""
        return self.sources["store"].kind != DEFAULT

    def shown(self) -> dict[str, Any]:
        """Field -> value, with secrets masked: for people and logs."""
        return {setting.field: show(setting, getattr(self, setting.field)) for setting in SETTINGS}

    def __repr__(self) -> str:
        """All values, secrets masked."""
        return f"Settings({', '.join(f'{field}={value!r}' for field, value in self.shown().items())})"


def load(environ: Mapping[str, str] | None = None, **overrides: Any) -> Settings:
    """Read all settings from ``environ`` (default: the process' own) and ``overrides`` by field name.

    An override is a value of the field's type or the text that the variable would have; None means "not given".
    Raises ConfigError, naming the variable or argument, its value (masked if secret) and what is allowed.
    """
    environ = os.environ if environ is None else environ
    if overrides.get("store") is not None and overrides.get("store_replicas") is None:
        overrides["store_replicas"] = ""  # the environment's replicas are of the environment's store
    found = given(environ, **overrides)
    _check_credentials(found)
    _check_keys(found)
    values = {
        setting.field: read(setting, found[setting.field]) if setting.field in found else default_of(setting, environ)
        for setting in SETTINGS
    }
    unset = Source(DEFAULT)
    return Settings(**values, sources={field: found[field].source if field in found else unset for field in values})


def given(environ: Mapping[str, str] | None = None, **overrides: Any) -> dict[str, Given]:
    """Field -> text and source, of the fields that are set at all. Raises ConfigError for an override of no setting."""
    environ = os.environ if environ is None else environ
    unknown = [field for field in overrides if field not in _BY_FIELD]
    if unknown:
        raise ConfigError(f"{unknown[0]!r} is not a setting{_did_you_mean(nearest(unknown[0], _BY_FIELD))}")
    found = {}
    own_credentials = any(
        overrides.get(field) or environ.get(_BY_FIELD[field].variable, "").strip() for field in _CREDENTIALS
    )
    for setting in SETTINGS:
        field = setting.field
        if overrides.get(field) is not None:
            found[field] = Given(_text_of(overrides[field]), Source(OVERRIDE))
            continue
        borrowed = () if own_credentials and field in _CREDENTIALS else setting.also
        for variable in (setting.variable, *borrowed):
            text = environ.get(variable, "").strip()
            if text:
                found[field] = Given(text, Source(ENVIRONMENT, variable))
                break
    return found


def read(setting: Setting, found: Given) -> Any:
    """The value of what a setting was given. Raises ConfigError."""
    try:
        return setting.kind.read(found.text)
    except ValueError:
        raise ConfigError(explain(setting, found)) from None


def explain(setting: Setting, found: Given) -> str:
    """Why ``found`` cannot be the value of ``setting``: what was given, masked if secret, and what is allowed."""
    name = found.source.variable or f"{setting.field} (given in code)"
    return f"{name}={show(setting, found.text)!r} cannot be used: {setting.field} has to be {setting.kind.allowed}"


def show(setting: Setting, value: Any) -> Any:
    """``value`` as people may see it: secrets and credentials in an address as ``****``, at most 200 characters."""
    if setting.secret and value:
        return MASK
    return _SHOWN_SECRET.sub(MASK, value)[:200] if isinstance(value, str) else value


def default_of(setting: Setting, environ: Mapping[str, str] | None = None) -> Any:
    """What a setting is where nobody set it."""
    default = setting.default
    if isinstance(default, str) and "{cache}" in default:
        folder = user_cache_folder(environ)
        return default.replace("{cache}", folder.replace("%", "%25") if "://" in default else folder)
    return default


def user_cache_folder(environ: Mapping[str, str] | None = None) -> str:
    """``XDG_CACHE_HOME`` where it is an absolute path (its specification ignores others), else ``~/.cache``.

    Raises ConfigError where there is no home folder: guessing one in /tmp would let other users in.
    """
    environ = os.environ if environ is None else environ
    folder = environ.get("XDG_CACHE_HOME", "")
    if folder.startswith("/"):
        return folder.rstrip("/")
    home = environ.get("HOME") or os.path.expanduser("~")
    if not home.startswith("/"):
        raise ConfigError("this user has no home folder to cache in: set XDG_CACHE_HOME or HOME to an absolute path")
    return f"{home.rstrip('/')}/.cache"


def _text_of(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.9f}".rstrip("0").rstrip(".")
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value).strip()


def _check_credentials(found: Mapping[str, Given]) -> None:
    """Half a pair of our own credentials is a mistake; half a pair of AWS_* names is not our business."""
    set_fields = [field for field in _CREDENTIALS if field in found and found[field].text]
    if all(found[field].source.variable.startswith("AWS_") for field in set_fields):
        return
    for field in ("access_key_id", "secret_access_key"):
        if field not in set_fields:
            have, lack = _BY_FIELD[set_fields[0]].variable, _BY_FIELD[field].variable
            raise ConfigError(f"{have} is set and {lack} is not: set both, or neither to use the AWS_* names")


def _check_keys(found: Mapping[str, Given]) -> None:
    """Signatures that are required in so many words, and no key: nothing would be checked, and nobody would know."""
    policy = found.get("signatures")
    keys = (found.get(field) for field in ("verify_keys", "signing_key", "signing_key_file"))
    asked = policy is not None and policy.source.kind == ENVIRONMENT and policy.text.lower() == "require"
    if asked and not any(key and key.text for key in keys):
        raise ConfigError(
            "COLDSTART_SIGNATURES=require needs a key to check with: set COLDSTART_VERIFY_KEYS to the public keys"
        )


# --- names -----------------------------------------------------------------------------------------------------------


class UnknownVariable(NamedTuple):
    """A ``COLDSTART_*`` variable that no setting has, and the known name nearest to it ("" if none is near)."""

    name: str
    nearest: str

    def __str__(self) -> str:
        return f"{self.name} is not a setting of coldstart{_did_you_mean(self.nearest)}"


def unknown_variables(environ: Mapping[str, str] | None = None) -> tuple[UnknownVariable, ...]:
    """The ``COLDSTART_*`` variables that nothing reads, which are most likely misspelt. Sorted by name."""
    environ = os.environ if environ is None else environ
    known = {setting.variable.removeprefix(_PREFIX) for setting in SETTINGS} | _NOT_SETTINGS
    names = sorted(name.removeprefix(_PREFIX) for name in environ if name.startswith(_PREFIX))
    near = {name: nearest(name, known) for name in names if name not in known}
    return tuple(UnknownVariable(_PREFIX + name, best and _PREFIX + best) for name, best in near.items())


def nearest(name: str, known: Iterable[str]) -> str:
    """The name in ``known`` that ``name`` was most likely meant to be, or ""."""
    import difflib

    return next(iter(difflib.get_close_matches(name, sorted(known), 1)), "")


def _did_you_mean(name: str) -> str:
    return f"; did you mean {name}?" if name else ""


# --- the environment, for the few others that need it ----------------------------------------------------------------


def environment_now() -> dict[str, str]:
    """A copy of this process' environment, for those that must not see what its modules change in it later."""
    return dict(os.environ)


def read_variable(name: str) -> str | None:
    """A variable that is not a setting: one that the user's decorator declares, or a hub's cache location."""
    return os.environ.get(name)


def set_variables(changes: Mapping[str, str | None]) -> None:
    """Change this process' environment, as its libraries and children will see it. None removes a variable."""
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def child_environment(
    changes: Mapping[str, str | None] | None = None, *, settings: Settings | None = None
) -> dict[str, str]:
    """A copy of this process' environment for a child, with ``changes`` (None removes a variable).

    With ``settings``, what was overridden in this process is set in the child too, so that both see the same values.
    """
    environment = dict(os.environ)
    if settings is not None:
        for setting in SETTINGS:
            if settings.sources[setting.field].kind == OVERRIDE:
                environment[setting.variable] = _text_of(getattr(settings, setting.field))
    for name, value in (changes or {}).items():
        environment.pop(name, None)
        if value is not None:
            environment[name] = value
    return environment


def helper_environment(changes: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """``child_environment`` for a process of ours that reads or writes the store for us: what it decodes is not ours yet.

    It is told what it needs, and signs nothing.
    """
    return child_environment({**(changes or {}), "COLDSTART_SIGNING_KEY": None})


def redactor(settings: Settings | None = None, environ: Mapping[str, str] | None = None) -> Redactor:
    """What takes this process' secrets out of texts: those of ``settings``, and of variables whose names say so."""
    from coldstart.redaction import Redactor, is_secret_name

    environ = os.environ if environ is None else environ
    names = {variable for setting in SETTINGS if setting.secret for variable in (setting.variable, *setting.also)}
    found = {text.strip() for name, text in environ.items() if name in names or is_secret_name(name)}
    if settings is not None:
        found |= {getattr(settings, setting.field) for setting in SETTINGS if setting.secret}
    return Redactor(text for text in found if not text.startswith("/"))  # the path of a file that holds one


def worker_id(environ: Mapping[str, str] | None = None) -> str:
    """What the platform calls this worker: RunPod's pod, Modal's task; "" elsewhere."""
    environ = os.environ if environ is None else environ
    return environ.get("RUNPOD_POD_ID") or environ.get("MODAL_TASK_ID") or ""


def platform_name(environ: Mapping[str, str] | None = None) -> str:
    """Where this process runs: ``runpod`` (a serverless queue worker), ``modal`` (a container) or ``local``.

    A RunPod pod counts as local: it has RUNPOD_POD_ID, but no queue to take events from.
    """
    environ = os.environ if environ is None else environ
    if environ.get("RUNPOD_ENDPOINT_ID") and environ.get("RUNPOD_WEBHOOK_GET_JOB"):
        return "runpod"
    return "modal" if environ.get("MODAL_IS_REMOTE") == "1" else "local"
