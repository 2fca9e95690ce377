"""Fixtures for all tests: a clean environment, and an S3 server of this process."""

from __future__ import annotations

import logging
import os
import urllib.request
import uuid
from typing import TYPE_CHECKING

import pytest

from coldstart.stores import StoreOptions

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_OUTSIDE = ("COLDSTART_", "AWS_", "RUNPOD_", "MODAL_", "HF_")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test sees the settings or the home of whoever runs it, nor leaves anything there."""
    for name in list(os.environ):
        if name.startswith(_OUTSIDE):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The address of a moto server on a free port of this machine."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request would bury a failing test's own output
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_options(s3_endpoint: str) -> StoreOptions:
    """Options that reach the moto server, which takes any credentials."""
    return StoreOptions(endpoint_url=s3_endpoint, region="us-east-1", access_key_id="id", secret_access_key="secret")


@pytest.fixture
def s3_bucket(s3_endpoint: str) -> str:
    """A fresh, empty bucket on the moto server."""
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    request = urllib.request.Request(f"{s3_endpoint}/{name}", method="PUT")
    with urllib.request.urlopen(request, timeout=30):
        return name
