"""The document of a run as tables for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

MIB = 1 << 20
GIB = 1 << 30


def to_markdown(document: Mapping[str, Any]) -> str:
    """All tables: what was run, and what each stage found, or why it found nothing."""
    machine = document["machine"]
    lines = ["# The GPU path, measured", ""]
    if document["rehearsal"]:
        lines += ["**A rehearsal on fakes: the numbers mean nothing.**", ""]
    lines += [*(f"- {name}: {_words(found)}" for name, found in machine.items()), ""]
    lines += _table(("stage", "seconds", "outcome"), [_stage_row(*item) for item in document["stages"].items()])
    for name, stage in document["stages"].items():
        if stage.get("result") and name in _SECTIONS:
            lines += ["", f"## {name}", "", *_SECTIONS[name](stage["result"])]
    return "\n".join(lines) + "\n"


def _words(found: Any) -> str:
    if not isinstance(found, dict):
        return str(found)
    return ", ".join(f"{name} {_words(value) if isinstance(value, dict) else value}" for name, value in found.items())


def _stage_row(name: str, stage: Mapping[str, Any]) -> tuple[str, ...]:
    said = (stage.get("error") or stage.get("reason") or "").strip().splitlines()
    return name, f"{stage['seconds']:.1f}", ": ".join([stage["outcome"], *(line[:200] for line in said[-1:])])


def _table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = ["| " + " | ".join(headings) + " |", "| " + " | ".join("---" for _ in headings) + " |"]
    return lines + ["| " + " | ".join(str(cell).replace("|", "/") for cell in row) + " |" for row in rows]


def _openings(result: Mapping[str, Any]) -> list[str]:
    rows = [
        (name, each.get("first_seconds", "-"), each.get("median_seconds", each.get("skipped") or each.get("error", "")))
        for name, each in result.items()
    ]
    return _table(("fresh process", "first s", "median s"), rows)


def _copies(result: Mapping[str, Any]) -> list[str]:
    names = ("pinned_in", "registered_in", "pageable_in", "pinned_out")
    rows = [(name.replace("_", " "), *_rate(result[name])) for name in names]
    pinned = result["pinning"]
    return [*_table(_RATES, rows), "", f"Pinning: {pinned['seconds_per_gb']} s per GB."]


def _path(result: Mapping[str, Any]) -> list[str]:
    ratios = result["of_the_copy"]
    rows = [(name, *_rate(each), ratios.get(name, "1")) for name, each in result["sides"].items()]
    return _table((*_RATES, f"of the copy (goal {result['goal']})"), rows)


def _zstd(result: Mapping[str, Any]) -> list[str]:
    rows = [
        (
            f"{row['block_bytes'] >> 10} KiB",
            f"{row['plane_bytes'] / MIB:g} MiB",
            row["plane"]["gb_per_second"],
            row["bf16_gb_per_second"],
            f"{row['scratch_bytes'] / MIB:.1f} MiB",
        )
        for row in result["rows"]
    ]
    return _table(("block", "batch of plane", "plane GB/s", "as bf16 GB/s", "scratch"), rows)


def _ans(result: Mapping[str, Any]) -> list[str]:
    rows = [
        (
            f"{row['chunk_bytes'] >> 10} KiB",
            f"{row['batch_bytes'] / MIB:g} MiB",
            row["stored_part"],
            row["decode"]["gb_per_second"],
            row["encode"]["gb_per_second"],
            f"{row['decode_scratch_bytes'] / MIB:.1f} MiB",
        )
        for row in result["rows"]
    ]
    return _table(("chunk", "batch", "stored", "decode GB/s (goal 107)", "encode GB/s (goal 41)", "scratch"), rows)


def _kernels(result: Mapping[str, Any]) -> list[str]:
    rows = [(f"merge of {name}", *_rate(each)) for name, each in result["merge"].items()]
    rows += [(f"BLAKE3, chunks of {each['chunk_bytes'] >> 10} KiB", *_rate(each)) for each in result["blake3"]]
    return _table(_RATES, rows)


def _restores(result: Mapping[str, Any]) -> list[str]:
    rows = [
        (
            f"{row['raw_bytes'] / GIB:g} GiB",
            row["codec"],
            row["place"],
            row["decoded_by"],
            "/".join(f"{each:.3f}" for each in row["seconds"]),
            row["raw_gb_per_second"],
            row["stored_gb_per_second"],
            row["landing_after_fetch_seconds"],
            f"{row['device_bytes_beyond_state'] / MIB:.0f} MiB",
        )
        for row in result["rows"]
    ]
    headings = ("state", "codec", "from", "decoded by", "seconds", "raw GB/s", "stored GB/s", "landing after fetch s")
    return _table((*headings, "device memory beyond"), rows)


def _tests(result: Mapping[str, Any]) -> list[str]:
    return [f"{result['passed']} passed, {result['skipped']} skipped: {'; '.join(result['skip_reasons']) or 'none'}."]


def _compile(result: Mapping[str, Any]) -> list[str]:
    names = sorted({name for run in result["runs"] for name in run["phases"]})
    rows = [
        (run["scenario"], run["kind"], run["seconds"], *(run["phases"].get(name, "-") for name in names))
        for run in result["runs"]
    ]
    if "naive_over_restored" not in result:
        return _table(("scenario", "kind", "first answer s", *names), rows)
    ratios = (
        f"Naive over restored: {result['naive_over_restored']} (goal 10). Compile with the restored kernels over"
        f" without: {result['compile_hit_over_miss']} (goal 0.1). Outputs equal: {result['outputs_equal']}."
    )
    return [*_table(("scenario", "kind", "first answer s", *names), rows), "", ratios]


def _latency(result: Mapping[str, Any]) -> list[str]:
    return _table(("stream", "window", "p50 ms", "p95 ms", "p95 ratio"), list(_latency_rows(result)))


def _latency_rows(result: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    for stream, found in result["results"].items():
        for window, row in found["windows"].items():
            yield stream, window, round(row["p50_ms"], 3), round(row["p95_ms"], 3), round(row["p95_ratio"], 3)


_RATES = ("what", "GB/s", "slowest", "fastest")
_SECTIONS: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "openings": _openings,
    "copies": _copies,
    "path": _path,
    "zstd": _zstd,
    "ans": _ans,
    "kernels": _kernels,
    "tests": _tests,
    "restores": _restores,
    "compile": _compile,
    "latency": _latency,
}


def _rate(found: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    return found["gb_per_second"], found["slowest"], found["fastest"]
