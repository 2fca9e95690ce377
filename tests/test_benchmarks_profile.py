"""The profile of a restore: how samples of perf are read, and what each of them counts to."""

from __future__ import annotations

from collections import Counter

import pytest

from benchmarks import restore_profile as profile
from benchmarks.restore_profile import Sample, category_of, shares_of, to_markdown

K = "[kernel.kallsyms]"
PYTHON = "/usr/lib/libpython3.11.so.1.0"


def sample(*frames, pid=2, at=1.0):
    """A sample with these frames, innermost first; a text alone is a symbol of the kernel."""
    return Sample(pid, at, tuple(frame if isinstance(frame, tuple) else (frame, K) for frame in frames))


RECEIVING = ("_copy_to_iter", "tcp_recvmsg", "__sys_recvfrom", ("recv", "/lib/libc.so.6"), ("f", PYTHON))


@pytest.mark.parametrize(
    ("frames", "category"),
    [
        (RECEIVING, profile.RECEIVE_COPY),
        (RECEIVING[1:], profile.RECEIVE_CALL),
        (("clear_page_erms", "handle_mm_fault", *RECEIVING), profile.FAULTS),
        (("net_rx_action", "__do_softirq", *RECEIVING[1:]), profile.PROTOCOL),
        (("clear_page_erms", "shmem_write_begin", "vfs_write"), profile.PWRITE_PAGES),
        (("copy_folio_from_iter_atomic", "generic_perform_write", "vfs_write"), profile.PWRITE_COPY),
        ((("hash_many", "/x/blake3.cpython-311-x86_64-linux-gnu.so"), ("f", PYTHON)), profile.BLAKE3),
        ((("memmove", "/lib/x86_64-linux-gnu/libc.so.6"), ("f", PYTHON)), profile.COPY),
        ((("_PyEval_EvalFrameDefault", PYTHON),), profile.PYTHON),
        ((("f", "/x/lib/python3.11/lib-dynload/math.so"),), profile.PYTHON),
        ((("sha256", "/usr/lib/libcrypto.so.3"),), profile.SIGNING),
        (("new_function_of_a_kernel", ("f", PYTHON)), profile.PYTHON),
        (("new_function_of_a_kernel",), profile.KERNEL_REST),
    ],
)
def test_a_sample_counts_to_the_innermost_thing_that_has_a_name(frames, category):
    """A page fault within a copy is memory, packets taken in within a call are the protocol, and so on."""
    assert category_of(sample(*frames)) == category


def test_shares_are_those_of_the_fetcher_and_of_who_waits_for_it():
    """What the fetcher does before its first data is its start; the reader counts only while the fetcher lives."""
    blake3 = ("f", "/x/blake3.so")
    samples = [
        sample(("f", PYTHON), pid=1, at=0.0),
        sample(("f", PYTHON), pid=2, at=1.0),
        sample(blake3, pid=2, at=1.5),
        sample(*RECEIVING, pid=2, at=2.0),
        sample(blake3, pid=2, at=3.0),
        sample(("f", PYTHON), pid=1, at=2.5),
        sample(("f", PYTHON), pid=1, at=9.0),
        sample(("f", PYTHON), pid=3, at=2.5),
    ]
    fetched, beside = shares_of(samples)
    assert fetched == {profile.START: 2, profile.RECEIVE_COPY: 1, profile.BLAKE3: 1}
    assert beside == {profile.PYTHON: 1}


def test_perf_script_is_read(monkeypatch, tmp_path):
    """A head with process and time, then a frame a line with address, symbol and file; symbols may have spaces."""
    text = (
        "  77/78    12.500000: \n"
        "\tffffffff81000000 _copy_to_iter+0x1f ([kernel.kallsyms])\n"
        "\t    7f0000000000 operator new(unsigned long) (/lib/libstdc++.so.6)\n\n"
        "  79 13.000000:\n\t 7f00 [unknown] (/x/lib(deleted).so)\n\n"
    )
    program = tmp_path / "perf"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{text}END\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    first, second = profile.read_samples(tmp_path / "perf.data")
    assert (first.pid, first.at) == (77, 12.5)
    assert first.frames == (("_copy_to_iter", K), ("operator new(unsigned long)", "/lib/libstdc++.so.6"))
    assert (second.pid, second.at) == (79, 13.0)


def test_the_table_has_medians_and_all_rounds():
    """A row a category, the largest first, with its share in every round."""
    rounds = [
        (Counter({"a": 3, "b": 1}), Counter({"c": 1})),
        (Counter({"a": 2, "b": 2}), Counter()),
        (Counter({"a": 4}), Counter()),
    ]
    text = to_markdown(rounds, 1 << 30, "made by")
    assert "| a | 75.0% | 75.0%, 50.0%, 100.0% |\n| b | 25.0% | 25.0%, 50.0%, 0.0% |" in text
    assert "Samples of the fetcher: 4, 4, 4." in text
