"""The worker's image: its context, its tag, and what docker is asked for. ``docker`` is a stand-in that records."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from coldstart.deploy import image as module
from coldstart.deploy.image import Image, build_and_push, context_tag, find_dockerfile, own_requirements, write_context
from coldstart.deploy.sources import source_files
from coldstart.errors import ImageError, UsageError
from coldstart.script import PYTHONS, read_script

ROOT = Path(__file__).parent.parent
HANDLER = """# /// script
# requires-python = ">=3.13"
# dependencies = ["tokenizers>=0.20", "numpy>=2.0"]
# [tool.coldstart]
# apt = ["ffmpeg", "git"]
# ///
import helper
from coldstart import coldstart
@coldstart("m", load=one)
def handler(event, model): ...
"""
DOCKER = """#!{python}
import json, os, pathlib, sys
here = pathlib.Path({folder!r})
words = sys.argv[1:]
names = sorted(str(p.relative_to(words[-1])) for p in pathlib.Path(words[-1]).rglob("*") if p.is_file()) if words[0] == "build" else []
with open(here / "calls", "a") as file:
    file.write(json.dumps([words, names]) + "\\n")
print("docker says", words[0])
sys.exit(json.loads((here / "statuses").read_text()).get(words[0], 0))
"""


class Docker:
    """A ``docker`` on PATH that records its arguments and the context, and ends as it is told."""

    def __init__(self, folder):
        self.folder = folder
        program = folder / "docker"
        program.write_text(DOCKER.format(python=sys.executable, folder=str(folder)))
        program.chmod(0o755)
        self.ends(manifest=1)

    def ends(self, **statuses):
        """The exit status of each command from now on."""
        (self.folder / "statuses").write_text(json.dumps(statuses))

    @property
    def calls(self):
        """Arguments and, of a build, the names in its context."""
        path = self.folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def docker(tmp_path, monkeypatch):
    """A recording docker, the only program on PATH."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return Docker(tmp_path / "bin")


@pytest.fixture
def image(tmp_path):
    """The image of a handler with a neighbour."""
    (tmp_path / "handler.py").write_text(HANDLER)
    (tmp_path / "helper.py").write_text("")
    path = str(tmp_path / "handler.py")
    script = read_script(path)
    return Image(script, source_files(path, script), "handler.py")


def context(image, folder):
    """The context of an image, written to a new folder, and its tag."""
    folder.mkdir()
    write_context(str(folder), image)
    return folder, context_tag(str(folder), image)


def test_the_context_has_all_that_the_image_does(image, tmp_path):
    """The context is the Dockerfile, the requirements, this coldstart without caches, and the handler's files."""
    folder, _ = context(image, tmp_path / "context")
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    ours = {name for name in names if name.startswith("coldstart/")}
    assert names - ours == {"Dockerfile", "requirements.txt", "app/handler.py", "app/helper.py"}
    assert {"coldstart/__init__.py", "coldstart/cli/serve.py", "coldstart/py.typed"} <= ours
    assert not [name for name in ours if "__pycache__" in name or "_deploy" in name]
    assert (folder / "app" / "handler.py").read_text() == HANDLER
    assert (folder / "Dockerfile").read_bytes() == (ROOT / "deploy" / "runpod" / "Dockerfile").read_bytes()


def test_the_requirements_are_the_blocks_and_ours_once(image, tmp_path):
    """The block's requirements come first, then coldstart's own with S3 and RunPod's SDK, each once."""
    folder, _ = context(image, tmp_path / "context")
    lines = (folder / "requirements.txt").read_text().splitlines()
    assert lines[:2] == ["tokenizers>=0.20", "numpy>=2.0"]
    assert len(lines) == len(set(lines))
    names = {re.match(r"[\w-]+", line)[0] for line in lines}
    assert {"blake3", "zstandard", "boto3", "runpod"} <= names
    assert not {"torch", "modal", "pytest", "coldstart-gpu"} & names


def test_workers_with_a_gpu_get_what_decodes_there(image, tmp_path):
    """An image for a GPU has nvCOMP's library, and no other has its 43 MB."""
    plain, _ = context(image, tmp_path / "plain")
    with_gpu, _ = context(image._replace(script=image.script._replace(gpu=("L4",))), tmp_path / "gpu")
    added = {*(with_gpu / "requirements.txt").read_text().splitlines()}
    added -= {*(plain / "requirements.txt").read_text().splitlines()}
    assert [re.match(r"[\w-]+", line)[0] for line in added] == ["nvidia-libnvcomp-cu12"]


def test_an_installed_coldstart_needs_what_the_checkout_says(monkeypatch, tmp_path):
    """Read from an installed distribution's metadata, the requirements are those of pyproject.toml."""
    from_checkout = own_requirements()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [f"{line}; extra == '{extra}'" for extra in ("torch", "s3", "runpod") for line in extras[extra]]
    lines = [line.replace(">=1.10.1,<3", "<3,>=1.10.1") for line in lines]
    monkeypatch.setattr(module, "_PACKAGE", str(tmp_path / "site-packages" / "coldstart"))
    monkeypatch.setattr("importlib.metadata.requires", lambda _: [*lines, *reversed(project["dependencies"])])
    assert own_requirements() == from_checkout
    assert "runpod<3,>=1.10.1" in from_checkout


def test_a_coldstart_from_nowhere_is_told(monkeypatch, tmp_path):
    """Where neither a checkout nor a distribution says what coldstart needs, or its Dockerfile is gone, it is an error."""
    monkeypatch.setattr(module, "_PACKAGE", str(tmp_path / "coldstart"))
    monkeypatch.setattr(module, "_DISTRIBUTION", "a-distribution-that-nobody-has")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "other"\n')
    with pytest.raises(ImageError, match="pip install a-distribution-that-nobody-has, or give --image"):
        own_requirements()
    with pytest.raises(ImageError, match="Dockerfile is not at"):
        find_dockerfile()


def test_the_tag_is_the_contents(image, tmp_path):
    """Equal contexts have equal tags, whenever and wherever they were written; any change of content is another tag."""
    _, tag = context(image, tmp_path / "a")
    folder, again = context(image, tmp_path / "b")
    assert tag == again
    os.utime(folder / "requirements.txt", (1, 1))
    assert context_tag(str(folder), image) == tag
    script = image.script
    others = [
        image._replace(script=script._replace(apt=("git",))),
        image._replace(script=script._replace(python="3.12")),
        image._replace(script=script._replace(dependencies=("torch",))),
        image._replace(files=image.files[:1]),
    ]
    tags = {context(other, tmp_path / str(number))[1] for number, other in enumerate(others)}
    (folder / "app" / "helper.py").write_text("x = 1")
    tags.add(context_tag(str(folder), image))
    assert len(tags - {tag}) == 5


def test_docker_builds_and_pushes_once(image, docker, capfd):
    """Docker gets platform, tag and build arguments, then pushes; its words go to standard error, not to the result."""
    reference = build_and_push(image, "ghcr.io/me/minilm")
    assert re.fullmatch("ghcr.io/me/minilm:[0-9a-f]{16}", reference)
    (asked, _), (build, names), (push, _) = docker.calls
    assert asked == ["manifest", "inspect", reference]
    assert build[:-1] == [
        "build", "--platform", "linux/amd64", "--tag", reference,
        "--build-arg", "PYTHON=3.13", "--build-arg", "APT=ffmpeg git", "--build-arg", "FILE=handler.py",
    ]  # fmt: skip
    assert {"Dockerfile", "requirements.txt", "app/handler.py", "coldstart/__init__.py"} <= set(names)
    assert not os.path.exists(build[-1])
    assert push == ["push", reference]
    assert capfd.readouterr() == ("", "docker says build\ndocker says push\n")
    docker.ends(manifest=0)
    assert build_and_push(image, "ghcr.io/me/minilm") == reference
    assert [words[0] for words, _ in docker.calls] == ["manifest", "build", "push", "manifest"]


def test_a_dry_run_only_computes_the_reference(image, docker):
    """A dry run names the image that would be built, and asks docker for nothing."""
    reference = build_and_push(image, "me/minilm", dry_run=True)
    assert docker.calls == []
    assert build_and_push(image, "me/minilm") == reference


@pytest.mark.parametrize(
    ("statuses", "message"),
    [
        ({"manifest": 1, "build": 3}, "docker build failed with status 3: its messages above"),
        ({"manifest": 1, "push": 1}, r"docker push failed with status 1: log in to the registry \(docker login\)"),
    ],
)
def test_dockers_failures_are_told(image, docker, statuses, message):
    """A build or push that fails is an error with what to look at."""
    docker.ends(**statuses)
    with pytest.raises(ImageError, match=message):
        build_and_push(image, "me/minilm")


def test_a_missing_docker_is_told(image, monkeypatch, tmp_path):
    """Without docker the error says where to get it and what to do instead."""
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(
        ImageError,
        match=r"docker cannot be run here \(No such file.*or build the image elsewhere and give it with --image",
    ):
        build_and_push(image, "me/minilm")


@pytest.mark.parametrize("repository", ["", "UPPER/x", "ghcr.io/me/x:tag", "x y", "--rm", "/x", "ghcr.io/me/"])
def test_what_is_no_repository_is_refused(image, docker, repository):
    """A repository with a tag, or that docker could take for an option, is refused before anything runs."""
    with pytest.raises(UsageError, match="has to be a repository without a tag"):
        build_and_push(image, repository)
    assert docker.calls == []


@pytest.mark.parametrize("repository", ["minilm", "me/minilm", "ghcr.io/me/mini_lm-x", "localhost:5000/a/b.c"])
def test_repositories_of_all_forms_are_taken(image, repository):
    """Names with and without a registry, a port and signs are repositories."""
    assert build_and_push(image, repository, dry_run=True).startswith(f"{repository}:")


def test_the_dockerfile_serves_the_file_and_uses_each_argument():
    """The Dockerfile declares the arguments that the build passes, and its command starts the worker itself."""
    text = Path(find_dockerfile()).read_text()
    declared = set(re.findall(r"(?m)^ARG (\w+)", text))
    assert declared == set(Image(read_script(__file__), (), "x.py").arguments)
    command = re.search(r"(?m)^CMD (.+)$", text)[1]
    assert command.startswith('exec python -m coldstart serve "${HANDLER_FILE}')
    assert module.DEFAULT_PYTHON in PYTHONS
    assert f"ARG PYTHON={module.DEFAULT_PYTHON}\n" in text


TWO_HANDLERS = """import helper
from coldstart import coldstart
@coldstart("first", load=lambda: 1)
def one(event, model): return [helper.NAME, "first", event["input"]]
@coldstart("second", load=lambda: 2)
def two(event, model): return [helper.NAME, "second", event["input"]]
"""


def test_what_is_copied_serves_events_by_the_images_command(tmp_path, image):
    """The context's own coldstart, started by the Dockerfile's command, serves the handler that the variable chooses."""
    (tmp_path / "handler.py").write_text(TWO_HANDLERS)
    (tmp_path / "helper.py").write_text("NAME = 'helper'\n")
    folder, _ = context(image, tmp_path / "context")
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -P "$@"\n')
    python.chmod(0o755)
    (tmp_path / "empty").mkdir()
    command = re.search(r"(?m)^CMD (.+)$", (folder / "Dockerfile").read_text())[1]
    environment = {
        "PATH": str(python.parent), "HOME": str(tmp_path), "PYTHONPATH": str(folder), "COLDSTART_STORE": "off",
        "COLDSTART_LOG": "off", "HANDLER_FILE": str(folder / "app" / "handler.py"), "COLDSTART_HANDLER": "second",
    }  # fmt: skip
    done = subprocess.run(
        ["/bin/sh", "-c", command], env=environment, input='{"id": "1", "input": 7}\n', capture_output=True, text=True,
        cwd=tmp_path / "empty", timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["output"] == ["helper", "second", 7]
