"""What a worker that restores needs of its store: reads of one ref, of manifests and of blobs, and nothing else."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.faulty_server import BUCKET, FINE, Fault, FaultyServer
from tests.starts import SCALED, SCALES, Project

if TYPE_CHECKING:
    from pathlib import Path

DENIED = Fault(status=403)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """SCALES with one generation, in a folder that the servers of these tests serve. Not to be changed."""
    project = Project(tmp_path_factory.mktemp("reader"))
    project.write(SCALES)
    assert project.run().capture["published"]
    return project


def allowed(project: Project) -> re.Pattern[str]:
    """The keys that a reader of this snapshot may get."""
    ref = project.ref("scales").name
    return re.compile(rf"refs/scales/{ref}|manifests/scales/[^/]+|blobs/[0-9a-f]{{2}}/[0-9a-f]{{64}}")


def test_a_reader_of_one_ref_manifests_and_blobs_restores(project: Project) -> None:
    """With a credential that may read these and write nothing the start is restored; of all writes it tries one, the record."""
    keys = allowed(project)
    with FaultyServer(project.store, lambda key, _: FINE if keys.fullmatch(key) else DENIED) as server:
        start = project.run(**server.environment, COLDSTART_LOG="console")
        written = list(server.written)
        assert (start.kind, start.reason, start.output) == ("restored", "", SCALED)
        assert all(keys.fullmatch(key) for key in server.asked), server.asked
    assert len(written) == 1
    assert written[0].startswith(f"/{BUCKET}/starts/scales/")
    assert start.errors.count("start records are off") == 1


def test_without_start_records_nothing_is_written(project: Project) -> None:
    """With COLDSTART_START_RECORDS=off a reader does not even try, and nothing is said of it."""
    with FaultyServer(project.store) as server:
        start = project.run(**server.environment, COLDSTART_START_RECORDS="off", COLDSTART_LOG="console")
        assert (start.kind, server.written) == ("restored", [])
    assert "start records" not in start.errors


def test_a_reader_that_has_to_load_answers(project: Project, tmp_path: Path) -> None:
    """Where a reader's snapshot is refused it loads and answers; what it would store is refused, and that is told."""
    copy = project.copy(tmp_path / "copy")
    with FaultyServer(copy.store, lambda *_: DENIED) as server:
        start = copy.run(**server.environment)
    assert (start.kind, start.output) == ("fallback", SCALED)
    assert "AccessDenied" in start.reason
    assert not start.capture["published"]
