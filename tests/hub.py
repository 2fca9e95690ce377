"""A Hugging Face hub on loopback: serves folders as model repositories, so that ``HF_ENDPOINT=hub.url`` downloads them.

It answers what ``huggingface_hub`` asks for a model: the repository's description, its file tree, and files by HEAD and
GET with ranges, each with the headers of the real hub (commit, ETag, size; for large files the linked ones). What is absent is
a 404 with the hub's error code. Every request is recorded, so that a test can say that a start made none.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

LARGE_BYTES = 10 << 20
"""Files from this size on are served as the hub serves large ones: named by their SHA-256, with linked headers."""

_REPOSITORY = r"(?P<repository>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>[^/]+)"
_DESCRIPTION = re.compile(rf"/api/models/{_REPOSITORY}(/revision/{_REVISION})?\Z")
_TREE = re.compile(rf"/api/models/{_REPOSITORY}/tree/{_REVISION}(?P<under>/.*)?\Z")
_FILE = re.compile(rf"/{_REPOSITORY}/resolve/{_REVISION}/(?P<name>.+)\Z")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)\Z")


class Request(NamedTuple):
    """One request that the hub answered."""

    method: str
    path: str
    status: int


class HubFile(NamedTuple):
    """A file of a repository. ``etag`` is the git blob's SHA-1, for a large file the SHA-256 of its bytes."""

    path: Path
    size_bytes: int
    etag: str
    large: bool


class Hub:
    """A running hub: ``url`` for ``HF_ENDPOINT``, ``requests`` so far, oldest first."""

    def __init__(self, repositories: Mapping[str, Path]) -> None:
        self.repositories = {name: _files(Path(folder)) for name, folder in repositories.items()}
        self.requests: list[Request] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, name="hub")

    @property
    def url(self) -> str:
        """The address that ``HF_ENDPOINT`` takes."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, home: Path) -> dict[str, str]:
        """The variables that send a process to this hub, with ``home`` as its cache."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def commit(self, repository: str) -> str:
        """The commit that every revision of ``repository`` resolves to: 40 hex digits made from its files."""
        listing = "\n".join(f"{name} {file.etag}" for name, file in sorted(self.repositories[repository].items()))
        return hashlib.sha1(listing.encode()).hexdigest()

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def close(self) -> None:
        """Stop answering and free the port."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@contextmanager
def serving(repositories: Mapping[str, Path]) -> Iterator[Hub]:
    """A hub that serves ``repositories`` (``owner/name`` -> folder) while the context lasts."""
    hub = Hub(repositories)
    hub.start()
    try:
        yield hub
    finally:
        hub.close()


def _files(folder: Path) -> dict[str, HubFile]:
    return {
        path.relative_to(folder).as_posix(): _hub_file(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }


def _hub_file(path: Path) -> HubFile:
    size_bytes = path.stat().st_size
    if size_bytes >= LARGE_BYTES:
        with path.open("rb") as file:
            return HubFile(path, size_bytes, hashlib.file_digest(file, "sha256").hexdigest(), large=True)
    blob = hashlib.sha1(f"blob {size_bytes}\0".encode() + path.read_bytes()).hexdigest()
    return HubFile(path, size_bytes, blob, large=False)


def _handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    """The request handler class bound to one hub: http.server makes an object of it for every connection."""
    return type("BoundHubHandler", (_HubHandler,), {"hub": hub})


class _HubHandler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        for pattern, answer in ((_DESCRIPTION, self._describe), (_TREE, self._list), (_FILE, self._send_file)):
            found = pattern.match(path)
            if found is not None:
                self._answer_from(found, answer)
                return
        self._send_missing("EntryNotFound", f"nothing is served at {path}")

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the name of the base class
        """Keep the test's output quiet; ``hub.requests`` has it all."""

    def _answer_from(self, found: re.Match[str], answer: Any) -> None:
        repository = found["repository"]
        if repository not in self.hub.repositories:
            self._send_missing("RepoNotFound", f"no repository {repository}")
            return
        answer(repository, found)

    def _describe(self, repository: str, _found: re.Match[str]) -> None:
        names = sorted(self.hub.repositories[repository])
        self._send_json({
            "_id": "0" * 24,
            "id": repository,
            "modelId": repository,
            "sha": self.hub.commit(repository),
            "private": False,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": [{"rfilename": name} for name in names],
        })  # fmt: skip

    def _list(self, repository: str, found: re.Match[str]) -> None:
        under = (found["under"] or "/").strip("/")
        inside = {name: file for name, file in self.hub.repositories[repository].items() if _is_under(name, under)}
        if under and not inside:
            self._send_missing("EntryNotFound", f"no folder {under}")
            return
        self._send_json([_tree_entry(name, file) for name, file in inside.items()])

    def _send_file(self, repository: str, found: re.Match[str]) -> None:
        file = self.hub.repositories[repository].get(found["name"])
        if file is None:
            self._send_missing("EntryNotFound", f"no file {found['name']}", commit=self.hub.commit(repository))
            return
        first, last = _requested(self.headers.get("Range"), file.size_bytes)
        part = (first, last) != (0, file.size_bytes - 1)
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Length": str(last - first + 1),
            "Accept-Ranges": "bytes",
            "ETag": f'"{file.etag}"',
            "X-Repo-Commit": self.hub.commit(repository),
        }
        if part:
            headers["Content-Range"] = f"bytes {first}-{last}/{file.size_bytes}"
        if file.large:
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(file.size_bytes)}
        self._send_head(206 if part else 200, headers)
        if self.command == "GET":
            with file.path.open("rb") as source:
                source.seek(first)
                self.wfile.write(source.read(last - first + 1))

    def _send_json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self._send_head(200, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        if self.command == "GET":
            self.wfile.write(body)

    def _send_missing(self, code: str, message: str, *, commit: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message, "Content-Length": "0"}
        self._send_head(404, headers | ({"X-Repo-Commit": commit} if commit else {}))

    def _send_head(self, status: int, headers: Mapping[str, str]) -> None:
        self.hub.requests.append(Request(self.command, self.path, status))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def _is_under(name: str, folder: str) -> bool:
    return not folder or name.startswith(f"{folder}/")


def _tree_entry(name: str, file: HubFile) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": file.size_bytes, "oid": file.etag[:40]}
    if file.large:
        entry["lfs"] = {"oid": file.etag, "size": file.size_bytes, "pointerSize": 134}
    return entry


def _requested(header: str | None, size_bytes: int) -> tuple[int, int]:
    """First and last byte that a Range header asks for; the whole file without one, or with a form not understood."""
    found = _RANGE.match(header or "")
    if found is None or int(found[1]) >= size_bytes:
        return 0, size_bytes - 1
    return int(found[1]), min(int(found[2]), size_bytes - 1) if found[2] else size_bytes - 1
