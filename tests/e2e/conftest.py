"""Projects for the starts in real processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.starts import SCALES, Project

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """An empty folder for handler files, with a store of its own."""
    return Project(tmp_path / "project")


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """SCALES with its first generation. Not to be changed: ``scales`` is a copy."""
    project = Project(tmp_path_factory.mktemp("published"))
    project.write(SCALES)
    start = project.run()
    assert (start.kind, start.reason) == ("cold", "no snapshot yet")
    assert start.capture["published"]
    return project


@pytest.fixture
def scales(published: Project, tmp_path: Path) -> Project:
    """SCALES with its first generation."""
    return published.copy(tmp_path / "scales")
