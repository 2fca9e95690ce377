"""Who reads the model, and with which settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.restoring.model import SAFETENSORS, TENSORIZER
from benchmarks.restoring.place import BUCKET
from benchmarks.restoring.reading import Task

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from benchmarks.restoring.place import Place
    from benchmarks.restoring.server import ObjectServer

LIMIT = "bare sockets: the limit"
OURS = "coldstart, raw"
OURS_THREADS = "coldstart, raw, threads"
OURS_PLANES = "coldstart, planes+zstd"
OURS_PLANES_THREADS = "coldstart, planes+zstd, threads"
RUNAI = "Run:ai Model Streamer 0.17.0"

_OF_SNAPSHOTS = ("ours", "engines", "nobody")
_REGION = "us-east-1"
_KEY_ID, _SECRET = "benchmark", "not-a-secret"  # nginx looks at no signature


class Contender(NamedTuple):
    """A line of the table. ``peer``: the word that ``--peers`` takes, "" for coldstart and the limit."""

    name: str
    reader: str
    object_key: str
    options: Mapping[str, Any] = {}
    variables: Mapping[str, str] = {}
    peer: str = ""


def _ours(name: str, prefix: str, engine: str) -> Contender:
    return Contender(name, "ours", prefix, variables={"COLDSTART_FETCH_ENGINE": engine})


CONTENDERS = (
    Contender(LIMIT, "limit", SAFETENSORS),
    _ours(OURS, "raw", "auto"),
    _ours(OURS_THREADS, "raw", "threads"),
    _ours(OURS_PLANES, "planes", "auto"),
    _ours(OURS_PLANES_THREADS, "planes", "threads"),
    Contender(RUNAI, "runai", SAFETENSORS, peer="runai"),
    Contender("tensorizer 2.12.1", "tensorizer", TENSORIZER, peer="tensorizer"),
    Contender("tensorizer 2.12.1, verify_hash", "tensorizer", TENSORIZER, {"verify": True}, peer="tensorizer"),
    Contender("obstore 0.12.1 + 15 lines", "obstore", SAFETENSORS, peer="obstore"),
    Contender("s5cmd 2.3.0 + safetensors", "s5cmd", SAFETENSORS, peer="s5cmd"),
    Contender("boto3 1.44.5 + safetensors", "boto3", SAFETENSORS, peer="boto3"),
)
ENGINES = (
    Contender("threads", "engines", "raw", variables={"COLDSTART_FETCH_ENGINE": "threads"}),
    Contender("process", "engines", "raw", variables={"COLDSTART_FETCH_ENGINE": "process"}),
    Contender("2 processes", "engines", "raw", variables={"COLDSTART_FETCH_PROCESSES": "2"}),
    Contender("threads over obstore", "engines", "raw", {"client": "obstore"}),
)
"""Who may fetch, beside an import."""

PEERS = tuple(dict.fromkeys(each.peer for each in CONTENDERS if each.peer))


def task_of(
    contender: Contender, place: Place, server: ObjectServer, *, pause_seconds: float = 0.0, tls: bool = False
) -> Task:
    """What to give to the contender's reader."""
    return Task(
        url=server.tls_url if tls else server.url,
        bucket=BUCKET,
        object_key=contender.object_key,
        object_bytes=place.object_bytes(contender.object_key) if contender.reader not in _OF_SNAPSHOTS else 0,
        folder=str(place.work),
        certificate=str(server.certificate),
        pause_seconds=pause_seconds,
        options=dict(contender.options),
    )


def variables_of(contender: Contender, place: Place, server: ObjectServer, *, tls: bool = False) -> dict[str, str]:
    """The environment of the contender's reader: coldstart's settings and the peers'."""
    url = server.tls_url if tls else server.url
    return {
        **_store_variables(contender.object_key, url, place.work),
        **({"SSL_CERT_FILE": str(server.certificate)} if tls else {}),
        "AWS_ACCESS_KEY_ID": _KEY_ID,
        "AWS_SECRET_ACCESS_KEY": _SECRET,
        "AWS_REGION": _REGION,
        "AWS_ENDPOINT_URL": url,
        "AWS_EC2_METADATA_DISABLED": "true",
        "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
        **contender.variables,
    }


def _store_variables(prefix: str, url: str, work: Path) -> dict[str, str]:
    return {
        "COLDSTART_STORE": f"s3://{BUCKET}/{prefix}",
        "COLDSTART_ENDPOINT_URL": url,
        "COLDSTART_REGION": _REGION,
        "COLDSTART_ACCESS_KEY_ID": _KEY_ID,
        "COLDSTART_SECRET_ACCESS_KEY": _SECRET,
        "COLDSTART_FILES_FOLDER": str(work / "files"),
        "COLDSTART_START_RECORDS": "off",
    }
