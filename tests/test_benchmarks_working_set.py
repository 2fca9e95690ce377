"""Reading a start's files ahead: what is recorded, how it is asked for, and what the rows of the benchmark say."""

from __future__ import annotations

import os
import sys

import pytest

from benchmarks.import_working_set import report, summary, turned
from benchmarks.working_set import (
    Image,
    Way,
    alone,
    end_of,
    plan_bytes,
    plans_of,
    ranges_of,
    read_ahead,
    record,
    resident_pages,
    start,
    write_plan,
)


def test_pages_in_memory_become_ranges_that_end_with_the_file():
    """Pages next to each other, or nearly, are one range; a far one is another; the last ends where the file does."""
    near, far = 40, 400
    resident = b"\1\1" + b"\0" * near + b"\1" + b"\0" * far + b"\1"
    size = (len(resident) - 1) * 4096 + 10
    assert ranges_of(resident, size) == [(0, (3 + near) * 4096), ((3 + near + far) * 4096, size)]
    assert ranges_of(b"\0\0", 5000) == []


def test_a_round_turns_the_order_and_leaves_out_nobody():
    """No way always comes after the same one."""
    names = ["a", "b", "c"]
    orders = [turned(names, number) for number in range(4)]
    assert orders == [["a", "b", "c"], ["a", "c", "b"], ["c", "a", "b"], ["c", "b", "a"]]


def test_a_way_is_compared_with_the_plain_start_of_its_own_round():
    """The ratio is the median of the rounds' ratios, not the ratio of medians; both processes' work counts."""

    def starts(*seconds):
        return [{"seconds": each, "processor_seconds": 1.0, "ahead_processor_seconds": 0.5} for each in seconds]

    found = summary({"plain": starts(2.0, 9.0, 3.0), "way": starts(1.0, 3.0, 2.0)})
    assert found["way"] == {"median": 2.0, "least": 1.0, "most": 3.0, "processor": 1.5, "faster": 2.0}
    assert found["plain"]["faster"] == 1.0


@pytest.fixture
def image(tmp_path):
    """A package of two modules, one that is imported and one that is not, and data of which one file is read."""
    package = tmp_path / "image" / "tiny"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "import os\nfrom . import used\nopen(os.path.join(os.path.dirname(__file__), 'read')).close()"
    )
    (package / "used.py").write_text("")
    (package / "unused.py").write_text("")
    (package / "read").write_bytes(os.urandom(3 << 20))
    (package / "unread").write_text("")
    for path in package.iterdir():  # only what the disk has can be dropped from the cache
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return Image(package.parent, sys.executable)


def forget(folder):
    """Drop the pages of all files from memory; skip where the file system lives in memory."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if any(page & 1 for page in resident_pages(path)):
            pytest.skip("a file system that keeps its pages in memory")


def test_a_start_is_recorded_read_ahead_and_timed(image, tmp_path):
    """One small round: the recorded files are those opened, in order; reading ahead brings their pages back to memory, where it is slow."""
    code = f"import sys; sys.dont_write_bytecode = True; sys.path.insert(0, {str(image.root)!r}); import tiny"
    names = record(image, code, tmp_path)
    assert names == ["tiny/__init__.py", "tiny/used.py", "tiny/read"]
    plans = plans_of(image.root, names)
    assert plan_bytes({"tiny/read": plans["whole"]["tiny/read"]}) == 3 << 20
    assert plans["pages"]["tiny/read"] == [(0, 3 << 20)]  # written a moment ago
    write_plan(tmp_path / "whole", plans["whole"])

    forget(image.root / "tiny")
    end_of(read_ahead(image, Way("whole", 3, slow_ms=1e6), tmp_path))
    assert not resident_pages(image.root / "tiny/read")[-1] & 1  # no file system is that slow
    assert alone(image, Way("whole", 3), plans["whole"], tmp_path)["covered"] == 1.0
    assert all(page & 1 for page in resident_pages(image.root / "tiny/read"))

    for way in (None, Way("whole", 3)):
        timed = start(image, code, way, tmp_path)
        assert timed.seconds > 0
        assert (timed.ahead_processor_seconds > 0) == (way is not None)


def test_the_page_says_the_end_first_and_which_row_is_a_repetition():
    """A row's counts are shown per start; what a way does not have is left empty."""
    each = {"seconds": 2.0, "processor_seconds": 1.0, "ahead_processor_seconds": 0.5}
    row = {
        "place": "here",
        "code": "import tiny",
        "note": " (again)",
        "files": 3,
        "plan_bytes": {"whole": 3 << 20, "pages": 1 << 20},
        "ahead_alone": {"w": {"seconds": 0.5, "covered": 0.987}},
        "starts": {"plain": [each], "w": [each]},
        "counts": {"plain": {"reads": 7.0, "bytes": 2 << 20, "metadata": 9.0}},
    }
    page = report({"machine": {"text": "M"}, "rounds": 1, "load": "1.0", "end": ["It wins."], "rows": [row]})
    assert page.splitlines()[2] == "It wins."
    assert "## here: `import tiny` (again)" in page
    assert "| plain | 2.00 (2.00-2.00) | 1.00 | 1.50 | 2 | 7 |  |  |" in page
    assert "| w | 2.00 (2.00-2.00) | 1.00 | 1.50 |  |  | 0.50 | 99% |" in page
