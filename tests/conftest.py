"""Fixtures for all tests: a clean environment, and an S3 server of this process."""

from __future__ import annotations

import io
import ipaddress
import logging
import os
import signal
import sys
import threading
import urllib.request
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

from coldstart.stores import StoreOptions
from tests.fake_gpu.fixtures import fake_gpu_folder, own_gpu_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["fake_gpu_folder", "own_gpu_folder"]

# Machines that run tests are shared: how long an example takes says nothing about it.
hypothesis.settings.register_profile("coldstart", deadline=None)
hypothesis.settings.load_profile("coldstart")

LONGEST_FIRST = (
    "test_readme.py",
    "e2e/test_modal.py",
    "e2e/test_runpod.py",
    "e2e/test_starts.py",
    "e2e/test_programs.py",
    "e2e/test_faults.py",
    "test_handlers.py",
    "e2e/test_damage.py",
    "test_save_process.py",
    "test_stores_s3_reader.py",
    "contracts/test_store_contracts.py",
)
"""Files that take half a minute and more: begun last, one of them would run alone at the end. Others follow by name."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the longest files first, and leave slow tests out unless an expression of markers or a node id is given."""
    tests = Path(__file__).parent
    places = {tests / name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
    if config.option.markexpr or any("::" in argument for argument in config.args):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]


_OUTSIDE = ("COLDSTART_", "AWS_", "RUNPOD_", "MODAL_", "HF_")


def _clean(patch: pytest.MonkeyPatch, home: Path) -> None:
    for name in list(os.environ):
        if name.startswith(_OUTSIDE):
            patch.delenv(name)
    patch.setenv("HOME", str(home / "home"))
    patch.setenv("XDG_CACHE_HOME", str(home / "cache"))


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> None:
    """Ctrl-C is heard here and in processes started here: a shell that starts the tests in the background has it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def clean_environment_around_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fixtures that outlive a test do not see the settings of whoever runs it either."""
    with pytest.MonkeyPatch.context() as patch:
        _clean(patch, tmp_path_factory.mktemp("outside"))
        yield


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test sees the settings or the home of whoever runs it, or of the test before, nor leaves anything there."""
    _clean(monkeypatch, tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # commands put the folders of handlers' files first on it


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The address of a moto server on a free port of this machine."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request would bury a failing test's own output
    application = _one_request_at_a_time(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True)
    thread = threading.Thread(target=server.serve_forever, name="s3", daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def _one_request_at_a_time(application: Any) -> Any:
    """moto, whose threads look at a condition and write in two steps, as a server that does both in one.

    Without it a compare-and-swap that moto acknowledges may be lost now and then, which no S3 server is allowed to do, and
    a read of what is overwritten meanwhile is answered with 500. What a client sends slowly keeps nobody else waiting.
    """
    lock = threading.Lock()

    def serve(environ: dict[str, Any], start_response: Any) -> Any:
        if length := int(environ.get("CONTENT_LENGTH") or 0):
            environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(length))
        with lock:
            return application(environ, start_response)

    return serve


@pytest.fixture(scope="session")
def s3_options(s3_endpoint: str) -> StoreOptions:
    """Options that reach the moto server, which takes any credentials."""
    return StoreOptions(endpoint_url=s3_endpoint, region="us-east-1", access_key_id="id", secret_access_key="secret")


@pytest.fixture(scope="session")
def new_s3_bucket(s3_endpoint: str) -> Callable[[], str]:
    """Makes a fresh, empty bucket on the moto server and returns its name."""

    def make() -> str:
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        request = urllib.request.Request(f"{s3_endpoint}/{name}", method="PUT")
        with urllib.request.urlopen(request, timeout=30):
            return name

    return make


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate of localhost, with its key, in one file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    begins = datetime.now(UTC) - timedelta(days=1)
    made = (
        x509.CertificateBuilder(
            name, name, key.public_key(), x509.random_serial_number(), begins, begins + timedelta(9)
        )
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    path = tmp_path_factory.mktemp("certificate") / "both.pem"
    path.write_bytes(secret + made.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.fixture
def s3_bucket(new_s3_bucket: Callable[[], str]) -> str:
    """A fresh, empty bucket on the moto server."""
    return new_s3_bucket()


@pytest.fixture(autouse=True)
def no_workers_left() -> Iterator[None]:
    """Workers that a test started in this process end with it."""
    yield
    worker = sys.modules.get("coldstart.registry")
    if worker is not None:
        worker.forget_workers()


@pytest.fixture(autouse=True)
def nothing_known_of_servers() -> Iterator[None]:
    """What a server of one test enforces says nothing about that of another, which may have the same address."""
    yield
    probing = sys.modules.get("coldstart.stores.probing")
    if probing is not None:
        probing.ProbingStore.forget()


@pytest.fixture
def forgotten_imports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Handler files that a test imports, and what importing them left in the import system, are forgotten after it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield
    folders = (f"{tmp_path}{os.sep}", f"{Path(__file__).parent.parent / 'handlers'}{os.sep}")
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(folders):
            del sys.modules[name]
