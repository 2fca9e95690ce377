"""From the spawn of a RunPod worker to its first job's result: coldstart against the ordinary pattern.

    PYTHONPATH=. python benchmarks/runpod_first_result.py [--rounds N] [--link MB/S ...] [--output FILE.json]

Both workers run RunPod's real SDK process against a control plane of this machine, in which the job waits already; both
read the same incompressible state from one S3 server (moto) through one limited link of this machine. The ordinary worker
imports the SDK, reads the state with urllib at module level and calls ``runpod.serverless.start``; ours is ``coldstart
serve``, which restores in the shadow of the SDK's import and checks every byte. Beside them run, in the same rounds, their
two parts alone: ``coldstart run`` without any SDK, and an interpreter that only imports the SDK. All times are from just
before the spawn, of a fresh interpreter, with compiled bytecode; round 0 warms the disk cache and is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from coldstart.bench.machine import describe_machine
from coldstart.stores import StoreOptions, open_store
from tests.limited_link import LimitedLink
from tests.runpod_plane import Plane
from tests.runpod_workers import Line, Worker, lines

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

ROOT = Path(__file__).parent.parent
STATE_MIB = 32
LIMIT_SECONDS = 120.0
TARGET = 1.10

OURS = f"""
import numpy as np
from coldstart import coldstart

def load():
    return {{"bytes": np.random.default_rng(1).integers(0, 256, {STATE_MIB} << 20, dtype=np.uint8)}}

@coldstart("first-result", load=load)
def handler(event, model):
    return int(model["bytes"][-1]) + event["input"]
"""

ORDINARY = f"""
import os
import urllib.request

import numpy as np
import runpod

def load():
    state = np.empty({STATE_MIB} << 20, np.uint8)
    view, done = memoryview(state), 0
    with urllib.request.urlopen(os.environ["STATE_URL"]) as answer:
        while count := answer.readinto(view[done:]):
            done += count
    assert done == len(state)
    return state

STATE = load()

def handler(job):
    return int(STATE[-1]) + job["input"]

if __name__ == "__main__":
    runpod.serverless.start({{"handler": handler}})
"""


class Bench:
    """The folder, the store and the link that all workers of one link's rate share."""

    def __init__(self, folder: Path, link: LimitedLink) -> None:
        self.bucket = folder.name.lower().replace("_", "-")  # moto keeps what it has from one server to the next
        self.folder = folder
        self.link = link
        self.state_url = ""
        self.settings = {
            "COLDSTART_STORE": f"s3://{self.bucket}/snapshots",
            "COLDSTART_ENDPOINT_URL": link.url,
            "COLDSTART_REGION": "us-east-1",
            "COLDSTART_ACCESS_KEY_ID": "id",
            "COLDSTART_SECRET_ACCESS_KEY": "secret",
            "COLDSTART_CAPTURE_IDLE_SECONDS": "0",
            "COLDSTART_FILES_FOLDER": str(folder / "files"),
        }

    def prepare(self) -> None:
        """Make the snapshot, and put the same bytes where the ordinary worker reads them."""
        import boto3
        import numpy as np

        (self.folder / "ours.py").write_text(OURS)
        (self.folder / "ordinary.py").write_text(ORDINARY)
        credentials = {"aws_access_key_id": "id", "aws_secret_access_key": "secret"}
        client = boto3.client("s3", endpoint_url=self.link.url, region_name="us-east-1", **credentials)
        client.create_bucket(Bucket=self.bucket)
        state = np.random.default_rng(1).integers(0, 256, STATE_MIB << 20, dtype=np.uint8).tobytes()
        client.put_object(Bucket=self.bucket, Key="state.bin", Body=state)
        parameters = {"Bucket": self.bucket, "Key": "state.bin"}
        self.state_url = client.generate_presigned_url("get_object", Params=parameters, ExpiresIn=86_400)
        client.close()
        document = self._run()
        assert document["capture"]["published"], document["capture"]

    def ours(self, line: Line) -> float:
        """Seconds to the first result of a restored worker."""
        return self._first_result(line, "-m", "coldstart", "serve", "ours.py")

    def ordinary(self, line: Line) -> float:
        """Seconds to the first result of an ordinary worker."""
        return self._first_result(line, "ordinary.py")

    def restore_alone(self, _line: Line) -> float:
        """Seconds to the first answer of ``coldstart run``: the same restore, and no SDK."""
        began = time.monotonic()
        document = self._run("--no-wait")
        assert document["start"]["kind"] == "restored", document["start"]
        return float(document["first_answer_monotonic_seconds"] - began)

    def import_alone(self, line: Line) -> float:
        """Seconds until an interpreter has imported the SDK's serverless part."""
        code = "import runpod.serverless, time; print(time.monotonic())"
        environment = {**_inherited(), "PYTHONPATH": line.folder}
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, check=True, capture_output=True, timeout=LIMIT_SECONDS
        )
        return float(done.stdout) - began

    def _first_result(self, line: Line, *arguments: str) -> float:
        environment = {**self.settings, "STATE_URL": self.state_url, "HOME": str(self.folder)}
        with Plane(hold_seconds=1.0) as plane:
            (job,) = plane.queue(1)
            with Worker(plane, *arguments, line=line, folder=self.folder, environment=environment) as worker:
                result = plane.wait_for("result", job, seconds=LIMIT_SECONDS)
                assert set(result.data["body"]) == {"output"}, result.data
                seconds = result.seconds - worker.spawned_seconds
                worker.terminate(LIMIT_SECONDS)
        return seconds

    def _run(self, *options: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "coldstart", "run", "ours.py", "--input", "1", "--json", *options]
        environment = {**_inherited(), **self.settings, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, cwd=self.folder, env=environment, check=True, capture_output=True, timeout=LIMIT_SECONDS
        )
        document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return document

    def restored_starts(self) -> int:
        """How many starts the store has records of, all of which but the first must be restored."""
        store = open_store(self.settings["COLDSTART_STORE"], StoreOptions(self.link.url, "us-east-1", "id", "secret"))
        kinds = [json.loads(bytes(store.get(found.key).data))["kind"] for found in store.list("starts/")]
        store.close()
        assert kinds.count("cold") == 1, kinds
        assert set(kinds) == {"cold", "restored"}, kinds
        return kinds.count("restored")


def _inherited() -> dict[str, str]:
    left_out = ("RUNPOD_", "COLDSTART_", "PYTHONDONTWRITEBYTECODE", "PYTHONPATH")
    return {name: value for name, value in os.environ.items() if not name.startswith(left_out)}


def measure(bench: Bench, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Line -> what -> seconds, one for each round. The order within a round is turned around every time."""
    there = [line for line in lines() if not line.lack]
    trials: list[tuple[Line, str, Callable[[Line], float]]] = []
    for line in there:
        trials += [(line, "coldstart", bench.ours), (line, "ordinary", bench.ordinary)]
        trials += [(line, "restore alone", bench.restore_alone), (line, "import alone", bench.import_alone)]
    seconds: dict[str, dict[str, list[float]]] = {}
    for number in range(rounds + 1):
        for line, what, trial in trials if number % 2 else reversed(trials):
            took = trial(line)
            if number:
                seconds.setdefault(line.name, {}).setdefault(what, []).append(round(took, 4))
                print(f"round {number} {line.name} {what:14} {took:7.3f} s", flush=True)
    return seconds


def summary(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """Medians, and the two ratios as medians of the rounds' own."""
    of_rounds = list(
        zip(*(seconds[what] for what in ("coldstart", "ordinary", "restore alone", "import alone")), strict=True)
    )
    return {
        **{f"{what} median s": statistics.median(values) for what, values in seconds.items()},
        "ordinary / coldstart": statistics.median(ordinary / ours for ours, ordinary, _, _ in of_rounds),
        "coldstart / slower part alone": statistics.median(
            ours / max(restore, load) for ours, _, restore, load in of_rounds
        ),
    }


def report(document: Mapping[str, Any]) -> str:
    """The document as Markdown."""
    out = [
        "# First result of a RunPod worker",
        "",
        f"Machine: {document['machine']['text']}.",
        "",
        *(__doc__ or "").splitlines()[4:],
        "",
        (
            f"State: {STATE_MIB} MiB that no codec shrinks. {document['rounds']} rounds, one process at a time. The SDKs are"
            f" {', '.join(f'`{name}` = {version}' for name, version in document['sdk'].items())}. Ours leaves out the look at the"
            " processor that SDK 1.x takes while it is imported (1.2 s on this machine); the ordinary worker and the import alone"
            " have it."
        ),
        "",
    ]
    for link in document["links"]:
        rate = f"{link['megabytes_per_second']:g} MB/s" if link["megabytes_per_second"] else "no limit"
        out += [
            f"## Link: {rate}",
            "",
            (
                "| SDK | coldstart s | ordinary s | restore alone s | SDK import alone s | ordinary / coldstart |"
                f" coldstart / slower part alone (target {TARGET:.2f}) |"
            ),
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for name, found in link["summary"].items():
            cells = [f"{value:.2f}" for value in found.values()]
            out.append(f"| {name} | {' | '.join(cells)} |")
        out += ["", f"Restored starts by their records: {link['restored_starts']}, none of another kind.", ""]
    return "\n".join(out)


def versions() -> dict[str, str]:
    """Line of the SDK -> its version."""
    code = "import importlib.metadata as m; print(m.version('runpod'))"
    found = {}
    for line in lines():
        if not line.lack:
            environment = {**_inherited(), "PYTHONPATH": line.folder}
            done = subprocess.run(
                [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
            )
            found[line.name] = done.stdout.strip()
    return found


def run_link(megabytes_per_second: float, rounds: int) -> dict[str, Any]:
    """All rounds over one link."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="coldstart-runpod-")))
            link = stack.enter_context(LimitedLink(str(urlsplit(f"http://{host}").hostname), port))
            bench = Bench(folder, link)
            bench.prepare()
            link.down.bytes_per_second = megabytes_per_second * 1e6
            seconds = measure(bench, rounds)
            link.down.bytes_per_second = 0.0
            return {
                "megabytes_per_second": megabytes_per_second,
                "seconds": seconds,
                "summary": {name: summary(found) for name, found in seconds.items()},
                "restored_starts": bench.restored_starts(),
            }
    finally:
        server.stop()


def main() -> None:
    import logging

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--link", type=float, nargs="+", default=[8.0, 0.0], metavar="MB/S", help="0: no limit")
    parser.add_argument("--output", type=Path, help="JSON; the report goes beside it as .md")
    options = parser.parse_args()
    machine = describe_machine()
    document = {
        "machine": {**machine._asdict(), "text": str(machine)},
        "sdk": versions(),
        "rounds": options.rounds,
        "state_bytes": STATE_MIB << 20,
        "links": [run_link(rate, options.rounds) for rate in options.link],
    }
    print(report(document))
    if options.output:
        options.output.write_text(json.dumps(document, indent=2) + "\n")
        options.output.with_suffix(".md").write_text(report(document))


if __name__ == "__main__":
    main()
