"""The tests that need a GPU, as one stage: how many passed, and what the others said."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

from coldstart.config import child_environment

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.on_gpu.timing import Sizes

ROOT = Path(__file__).parent.parent.parent
FILES = ("tests/gpu", "tests/test_fake_driver.py")
"""Where tests of a GPU are; those of the driver are beside those of its fake."""
SUITE_SECONDS = 150.0
REHEARSED = ("tests/gpu/test_devices.py", "-k", "TestCupy or TestGpu")


def suite(sizes: Sizes) -> dict[str, Any]:
    """Outcomes of ``pytest -m gpu``. Raises RuntimeError where a test failed, or none ran: the counts are in its text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.xml"
        chosen = REHEARSED if sizes.is_rehearsal else FILES
        options = ("-m", "gpu", "-n", "0", "-q", "-p", "no:cacheprovider", "--timeout", "100", f"--junitxml={path}")
        output = _pytest([*options, *chosen])
        if not path.exists():
            raise RuntimeError(f"the tests ended without a report: {output[-1500:]}")
        found = outcomes(path)
    if found["failed"] or not found["passed"]:
        raise RuntimeError(f"{found}\n{output[-3000:]}")
    return found


def _pytest(arguments: Sequence[str]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        env=child_environment({}),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SUITE_SECONDS,
        check=False,
    )
    return done.stdout


def outcomes(path: Path) -> dict[str, Any]:
    """Counts of a report in JUnit's form, the names of what failed, and the reasons of what was skipped."""
    cases = list(ET.parse(path).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    reasons = sorted({str(case.find("skipped").get("message"))[:200] for case in skipped})  # type: ignore[union-attr]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": [f"{case.get('classname')}.{case.get('name')}" for case in failed],
        "skipped": len(skipped),
        "skip_reasons": reasons,
    }
