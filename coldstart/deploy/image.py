"""The worker's image: its build context, and ``docker build`` and ``docker push`` of it.

The context holds all that the image does: the Dockerfile, the requirements, this very coldstart, the handler's files.
Its tag is a hash of the context, so the same context is never built twice, and a reference says what is in it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from typing import TYPE_CHECKING, NamedTuple

from coldstart.errors import ImageError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from coldstart.script import Script

DEFAULT_PYTHON = "3.12"
"""The Python of an image whose file does not say ``requires-python``."""

_PLATFORM = "linux/amd64"
"""RunPod's machines, whatever the deploying one is."""

_DISTRIBUTION = "coldstart-gpu"
_EXTRAS = ("s3", "runpod")
NVCOMP = "nvcomp"
"""The extra for workers with a GPU: with it chunks are decoded there."""
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_NOT_COPIED = shutil.ignore_patterns("__pycache__", "*.pyc", "_deploy", ".*")
_REPOSITORY = re.compile(r"[a-z0-9][a-z0-9.-]*(:[0-9]+)?(/[a-z0-9]+([._-]+[a-z0-9]+)*)+|[a-z0-9]+([._-]+[a-z0-9]+)*")
_REQUIREMENT = re.compile(r"([\w.-]+(?:\[[^\]]*\])?)(.*)")
_EXTRA = re.compile(r"""extra\s*==\s*['"]([\w.-]+)['"]""")


class Image(NamedTuple):
    """An image to be made. ``arguments`` are the Dockerfile's build arguments."""

    script: Script
    files: Sequence[tuple[str, str]]
    """The sources, as ``source_files`` gives them."""
    file: str
    """The handler's file, by its name in ``files``."""

    @property
    def arguments(self) -> Mapping[str, str]:
        """The Dockerfile's build arguments."""
        return {
            "PYTHON": self.script.python or DEFAULT_PYTHON,
            "APT": " ".join(self.script.apt),
            "FILE": self.file,
        }


def build_and_push(image: Image, repository: str, *, dry_run: bool = False) -> str:
    """The reference of ``image`` in ``repository``, once it is there: built and pushed unless the registry has it.

    A dry run computes the reference and runs nothing. Raises UsageError for a repository that cannot be one, and
    ImageError where docker is missing or fails.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise UsageError(f"--registry {repository!r} has to be a repository without a tag, such as ghcr.io/me/minilm")
    with tempfile.TemporaryDirectory(prefix="coldstart-image-") as folder:
        write_context(folder, image)
        reference = f"{repository}:{context_tag(folder, image)}"
        if not dry_run and not _is_pushed(reference):
            _docker("build", *_build_options(image, reference), folder)
            _docker("push", reference)
    return reference


# --- the context -----------------------------------------------------------------------------------------------------


def write_context(folder: str, image: Image) -> None:
    """Lay out the build context in an empty folder. Raises ImageError where a part of coldstart cannot be found."""
    shutil.copyfile(find_dockerfile(), os.path.join(folder, "Dockerfile"))
    with open(os.path.join(folder, "requirements.txt"), "w", encoding="utf-8") as file:
        extras = (*_EXTRAS, NVCOMP) if image.script.gpu or image.script.runpod.gpu else _EXTRAS
        file.writelines(f"{line}\n" for line in dict.fromkeys((*image.script.dependencies, *own_requirements(extras))))
    shutil.copytree(_PACKAGE, os.path.join(folder, "coldstart"), ignore=_NOT_COPIED)
    for source, name in image.files:
        place = os.path.join(folder, "app", *name.split("/"))
        os.makedirs(os.path.dirname(place), exist_ok=True)
        shutil.copyfile(source, place)


def context_tag(folder: str, image: Image) -> str:
    """A hash of the context's names and bytes and of the build arguments: 16 hex digits."""
    digest = hashlib.sha256(repr(sorted(image.arguments.items())).encode())
    for name in sorted(_names(folder)):
        with open(os.path.join(folder, name), "rb") as file:
            digest.update(f"\0{name}\0".encode("utf-8", "surrogateescape"))
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _names(folder: str) -> Iterator[str]:
    for parent, _, names in os.walk(folder):
        yield from (os.path.relpath(os.path.join(parent, name), folder) for name in names)


def find_dockerfile() -> str:
    """The Dockerfile: in the installed package, or beside it in the repository. Raises ImageError."""
    places = (
        os.path.join(_PACKAGE, "_deploy", "runpod", "Dockerfile"),
        os.path.join(os.path.dirname(_PACKAGE), "deploy", "runpod", "Dockerfile"),
    )
    for place in places:
        if os.path.isfile(place):
            return place
    raise ImageError(f"coldstart's Dockerfile is not at {' nor at '.join(places)}: install coldstart again")


def own_requirements(extras: tuple[str, ...] = _EXTRAS) -> tuple[str, ...]:
    """What coldstart itself needs in a worker: its requirements and those of its ``extras``.

    Read from the pyproject.toml beside the package, where it runs from a checkout, else from the installed
    distribution. Raises ImageError where there is neither.
    """
    from importlib.metadata import PackageNotFoundError, requires

    project = os.path.join(os.path.dirname(_PACKAGE), "pyproject.toml")
    found = _requirements_of_project(project, extras) if os.path.isfile(project) else ()
    if found:
        return _canonical(found)
    try:
        lines = requires(_DISTRIBUTION) or []
    except PackageNotFoundError as error:
        raise ImageError(
            f"what coldstart needs is not known: neither {project} nor the installed package {_DISTRIBUTION} is there;"
            f" pip install {_DISTRIBUTION}, or give --image"
        ) from error
    return _canonical(requirement for line in lines if (requirement := _wanted(line, extras)))


def _canonical(requirements: Iterable[str]) -> tuple[str, ...]:
    """Sorted, each with its versions sorted: a build back end writes both in an order of its own."""
    named = (_REQUIREMENT.fullmatch(each.replace(" ", "")) for each in requirements)
    return tuple(sorted(f"{each[1]}{','.join(sorted(each[2].split(',')))}" for each in named if each))


def _requirements_of_project(path: str, wanted: tuple[str, ...]) -> tuple[str, ...]:
    import tomllib

    with open(path, "rb") as file:
        project = tomllib.load(file).get("project", {})
    if project.get("name") != _DISTRIBUTION:
        return ()
    extras = project["optional-dependencies"]
    return (*project["dependencies"], *(line for extra in wanted for line in extras[extra]))


def _wanted(line: str, extras: tuple[str, ...]) -> str:
    """A line of a distribution's metadata without its marker, "" if it belongs to an extra that is not among ``extras``."""
    requirement, _, marker = line.partition(";")
    extra = _EXTRA.search(marker)
    return requirement.strip() if extra is None or extra[1] in extras else ""


# --- docker ----------------------------------------------------------------------------------------------------------


def _build_options(image: Image, reference: str) -> list[str]:
    arguments = [text for name, value in image.arguments.items() for text in ("--build-arg", f"{name}={value}")]
    return ["--platform", _PLATFORM, "--tag", reference, *arguments]


def _is_pushed(reference: str) -> bool:
    return _run("manifest", "inspect", reference, stream=subprocess.DEVNULL) == 0


def _docker(*words: str) -> None:
    status = _run(*words, stream=2)  # our standard output is for the result
    if status:
        raise ImageError(f"docker {words[0]} failed with status {status}: {_ADVICE[words[0]]}")


_ADVICE = {
    "build": "its messages above say why; check the block's dependencies and apt packages",
    "push": "log in to the registry (docker login) and check that the repository exists",
}


def _run(*words: str, stream: int) -> int:
    try:
        return subprocess.run(["docker", *words], stdin=subprocess.DEVNULL, stdout=stream, stderr=stream).returncode  # noqa: PLW1510  the status is the answer
    except OSError as error:
        raise ImageError(
            f"docker cannot be run here ({error.strerror}): install it (https://docs.docker.com/get-docker),"
            " or build the image elsewhere and give it with --image"
        ) from error
