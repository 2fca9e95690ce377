"""``ctx``: files that are kept and downloaded, declared variables, and lines and phases of the user's own."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from blake3 import blake3

from coldstart import coldstart
from coldstart.caches import KEPT, FileSource
from coldstart.context import Context, Declared
from coldstart.errors import HandlerError, UndeclaredNameError

DATA = bytes(range(256)) * 1000


@pytest.fixture
def seen():
    """What a context did with its start: the spans and lines in order."""
    return []


@pytest.fixture
def ctx(tmp_path, seen):
    """The context of a cold start that declares MODEL and TOKEN."""

    @contextmanager
    def span(name):
        seen.append(name)
        yield

    return Context(
        device="cpu",
        declared=Declared(env=("MODEL",), secrets=("TOKEN",)),
        span=span,
        log=lambda message, fields: seen.append((message, dict(fields))),
        scratch=tmp_path / "scratch",
        pool=lambda *asked: seen.append(asked),
    )


@pytest.fixture
def assets(tmp_path):
    """A folder with two files, one of them deeper, and a third beside it."""
    folder = tmp_path / "assets"
    (folder / "deep").mkdir(parents=True)
    (folder / "vocab.txt").write_text("a b c")
    (folder / "deep" / "merges.txt").write_text("a b")
    (tmp_path / "config.json").write_text("{}")
    return folder


# --- keep ------------------------------------------------------------------------------------------------------------


def test_a_kept_file_is_found_by_its_name(ctx, assets):
    """``keep`` returns the path itself and lists the file under its last part."""
    path = assets / "vocab.txt"
    assert ctx.keep(path) == path
    assert ctx.files == {"vocab.txt": str(path)}
    assert ctx.kept == [FileSource(KEPT, "vocab.txt", str(path))]


def test_a_kept_file_may_have_another_name(ctx, assets):
    """``name=`` says under which relative path the file is kept."""
    ctx.keep(str(assets / "vocab.txt"), name="tokenizer/vocab.txt")
    assert list(ctx.files) == ["tokenizer/vocab.txt"]


def test_every_file_of_a_kept_folder_is_kept(ctx, assets):
    """A folder's files are listed below its name, whatever they are called."""
    for name in ("deep/poetry.lock", "blobs/x", "deep/.hidden"):
        (assets / name).parent.mkdir(exist_ok=True)
        (assets / name).touch()
    assert ctx.keep(assets) == assets
    names = ["blobs/x", "deep/.hidden", "deep/merges.txt", "deep/poetry.lock", "vocab.txt"]
    assert sorted(ctx.files) == [f"assets/{name}" for name in names]
    assert all(Path(path).is_file() for path in ctx.files.values())


def test_keeping_again_changes_nothing(ctx, assets):
    """The same file under the same name is one file."""
    for _ in range(2):
        ctx.keep(assets)
        ctx.keep(assets / "vocab.txt")
    assert sorted(item.name for item in ctx.kept) == ["assets/deep/merges.txt", "assets/vocab.txt", "vocab.txt"]


def test_relative_paths_are_kept_as_absolute_ones(ctx, assets, monkeypatch):
    """A change of the working folder after ``load`` does not move what was kept."""
    monkeypatch.chdir(assets)
    assert ctx.keep("vocab.txt") == Path("vocab.txt")
    assert ctx.files["vocab.txt"] == str(assets / "vocab.txt")


def test_a_name_of_another_file_is_refused(ctx, assets, tmp_path):
    """Two files cannot have one name: at a restore one of them would be taken for the other."""
    (assets / "config.json").write_text("[]")
    ctx.keep(tmp_path / "config.json")
    with pytest.raises(HandlerError, match=r"config.json is kept as 'config.json' already; pass another name="):
        ctx.keep(assets / "config.json")
    ctx.keep(assets / "config.json", name="other.json")
    assert ctx.files["config.json"] != ctx.files["other.json"]


@pytest.mark.parametrize("path", ["absent.txt", "absent/folder"])
def test_what_is_not_there_cannot_be_kept(path, ctx, tmp_path):
    """A wrong path is told, with the path."""
    with pytest.raises(HandlerError, match=rf"{path}.*: no file is there, nor a folder with files: check the path"):
        ctx.keep(tmp_path / path)


def test_an_empty_folder_cannot_be_kept(ctx, tmp_path):
    """A snapshot holds files: a folder without any would be missing at a restore."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(HandlerError, match="nor a folder with files"):
        ctx.keep(tmp_path / "empty")


@pytest.mark.parametrize("name", ["../up.txt", "/etc/passwd", "a//b", "a\nb", ".."])
def test_names_that_lead_elsewhere_are_refused(name, ctx, assets):
    """A name is a relative path without tricks, and the error says so."""
    with pytest.raises(HandlerError, match=r"cannot be kept as .*: pass name= as a relative path without '..'"):
        ctx.keep(assets / "vocab.txt", name=name)


def test_restored_files_are_found_instead(ctx, assets, tmp_path):
    """After a restore ``keep`` returns the restored copy, even where the original is gone, and ``files`` lists it."""
    folder = tmp_path / "restored"
    for name in ("vocab.txt", "assets/deep/merges.txt"):
        (folder / KEPT / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / KEPT / name).write_text("restored")
    ctx.use_restored(folder, ("vocab.txt", "assets/deep/merges.txt"))
    assert ctx.files["vocab.txt"] == str(folder / KEPT / "vocab.txt")
    assert ctx.keep("/gone/vocab.txt").read_text() == "restored"
    assert (ctx.keep("/gone/assets") / "deep" / "merges.txt").read_text() == "restored"
    assert ctx.download("https://gone.invalid/vocab.txt").read_text() == "restored"


def test_a_missing_file_says_which_there_are(ctx, assets):
    """Asking for a name that was never kept lists those that were, and how to keep it."""
    with pytest.raises(HandlerError, match=r"no 'vocab.txt' \(there: none\)"):
        ctx.files["vocab.txt"]
    ctx.keep(assets)
    told = r"no 'vocab.txt' \(there: assets/deep/merges.txt, assets/vocab.txt\); keep it in load with ctx.keep\("
    with pytest.raises(HandlerError, match=told):
        ctx.files["vocab.txt"]


def test_declared_files_are_kept_before_load(tmp_path, monkeypatch):
    """``files=`` names paths beside the handler's file, and ``load`` finds them in ``ctx.files``."""
    monkeypatch.setenv("COLDSTART_LOG", "off")
    handler = coldstart("files", load=lambda ctx: dict(ctx.files), files={"me": Path(__file__).name})
    assert handler(lambda event, model: model)({"input": 0}) == {"me": __file__}


@contextmanager
def traced():
    """Makes functions whose code lies in contextlib, as that of ``torch.inference_mode()`` lies in torch."""
    yield


def test_declared_files_lie_beside_the_handler_whatever_decorates_it(monkeypatch):
    """A decorator below ours, whose code lies elsewhere, moves neither the handler nor its files."""
    monkeypatch.setenv("COLDSTART_LOG", "off")

    @coldstart("decorated", load=lambda ctx: dict(ctx.files), files={"me": Path(__file__).name})
    @traced()
    def handler(event, model):
        return model

    assert handler.__coldstart__.code.co_filename != __file__
    assert handler({"input": 0}) == {"me": __file__}


# --- download --------------------------------------------------------------------------------------------------------


class Server(BaseHTTPRequestHandler):
    """Serves DATA, an answer that ends early, redirects, and nothing else."""

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", path.removeprefix("/to/"))
            self.end_headers()
            return
        if not path.endswith((".bin", ".short")):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(DATA)))
        self.end_headers()
        self.wfile.write(DATA[:-7] if path.endswith(".short") else DATA)

    def log_message(self, *_arguments): ...


@contextmanager
def serving(host):
    """A server on a free port of this machine; gives its address."""
    with ThreadingHTTPServer((host, 0), Server) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://{host}:{running.server_port}"
        finally:
            running.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def server():
    """The address of a server."""
    with serving("127.0.0.1") as address:
        yield address


def test_a_download_is_kept_under_the_last_part_of_its_address(ctx, server):
    """The file is fetched in full and kept; the query is no part of its name."""
    path = ctx.download(f"{server}/models/weights.bin?revision=2")
    assert path.read_bytes() == DATA
    assert ctx.files == {"weights.bin": str(path)}


@pytest.mark.parametrize("spelling", [str.lower, str.upper])
def test_a_download_with_the_right_hash_is_taken(spelling, ctx, server):
    """The expected hash in hex, in either case, lets the bytes pass."""
    expected = spelling(blake3(DATA).hexdigest())
    assert ctx.download(f"{server}/weights.bin", name="w", blake3=expected).read_bytes() == DATA


def test_a_download_with_another_hash_is_refused_and_leaves_nothing(ctx, server, tmp_path):
    """Bytes that are not the expected ones are an error, and no file of them stays."""
    with pytest.raises(HandlerError, match=r"weights.bin'\): the bytes are not those of blake3='00"):
        ctx.download(f"{server}/weights.bin", blake3="00" * 32)
    assert ctx.files == {}
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_download_that_ends_early_is_refused_and_leaves_nothing(ctx, server, tmp_path):
    """A connection that breaks off is no whole file, even without a hash."""
    with pytest.raises(HandlerError, match=r"weights.short'\).*7 (bytes early; try again|more expected)"):
        ctx.download(f"{server}/weights.short")
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_download_that_is_not_there_is_told(ctx, server):
    """The server's own answer is in the message."""
    with pytest.raises(HandlerError, match=r"absent.txt'\) failed: HTTP Error 404: Not Found; is the address right"):
        ctx.download(f"{server}/absent.txt")


def test_a_server_that_is_not_there_is_told(ctx):
    """A refused connection is a HandlerError, not the library's own."""
    with pytest.raises(HandlerError, match=r"failed: .*[Cc]onnection refused"):
        ctx.download("http://127.0.0.1:9/weights.bin")


@pytest.mark.parametrize(
    "url",
    [
        "http://example.invalid/a.bin",
        "http://localhost.example.invalid/a.bin",
        "http://127.0.0.1.example.invalid/a.bin",
        "ftp://127.0.0.1/a.bin",
        "file:///etc/a.bin",
        "https:///a.bin",
        "a.bin",
    ],
)
def test_only_https_is_fetched(url, ctx):
    """Without encryption nothing is fetched but from this machine itself."""
    with pytest.raises(HandlerError, match=r"only https is fetched; give an https:// address"):
        ctx.download(url)


def test_an_address_that_cannot_be_read_is_told(ctx):
    """A malformed address is a HandlerError too."""
    with pytest.raises(HandlerError, match=r"ctx.download\('https://\[::1/a.bin'\): Invalid IPv6 URL"):
        ctx.download("https://[::1/a.bin", name="a.bin")


def test_a_redirect_is_held_to_the_same_rule(ctx, server):
    """A redirect within the rule is followed; one that leaves it is refused, though something answers there."""
    assert ctx.download(f"{server}/to/{server}/moved.bin").read_bytes() == DATA
    with serving("127.0.0.2") as elsewhere, pytest.raises(HandlerError, match=r"127.0.0.2.*only https is fetched"):
        ctx.download(f"{server}/to/{elsewhere}/other.bin")
    assert list(ctx.files) == ["moved.bin"]


def test_two_downloads_of_one_name_are_refused(ctx, server):
    """Another address with the same last part needs a name of its own; the same address is the same file."""
    assert ctx.download(f"{server}/a/x.bin") == ctx.download(f"{server}/a/x.bin")
    with pytest.raises(HandlerError, match=r"another download is called 'x.bin'; pass another name="):
        ctx.download(f"{server}/b/x.bin")
    assert ctx.download(f"{server}/b/x.bin", name="y.bin").name == "y.bin"


# --- variables -------------------------------------------------------------------------------------------------------


def test_declared_variables_are_read(ctx, monkeypatch):
    """A declared name gives the variable's value, or the default where it is not set."""
    assert ctx.env("MODEL") is None
    assert ctx.env("MODEL", "small") == "small"
    monkeypatch.setenv("MODEL", "large")
    assert ctx.env("MODEL", "small") == "large"


@pytest.mark.parametrize("name", ["TOKEN", "PATH", "model"])
def test_undeclared_variables_are_refused(name, ctx):
    """A name that is not in ``env=`` is told with the line to write, a secret's name too."""
    with pytest.raises(UndeclaredNameError, match=rf"ctx.env\('{name}'\): not declared; .* env=\['{name}'\]"):
        ctx.env(name)


def test_declared_secrets_are_read_and_never_shown(ctx, monkeypatch):
    """A declared secret gives its value; one that is not set is told by name."""
    with pytest.raises(HandlerError, match="the secret TOKEN is not set in this worker's environment"):
        ctx.secret("TOKEN")
    monkeypatch.setenv("TOKEN", "hush")
    assert ctx.secret("TOKEN") == "hush"


def test_undeclared_secrets_are_refused(ctx, monkeypatch):
    """A name that is not in ``secrets=`` is refused even where it is in ``env=``, and its value is not told."""
    monkeypatch.setenv("MODEL", "hush")
    with pytest.raises(
        UndeclaredNameError, match=r"ctx.secret\('MODEL'\): not declared; .*secrets=\['MODEL'\]"
    ) as caught:
        ctx.secret("MODEL")
    assert "hush" not in str(caught.value)


# --- lines and phases ------------------------------------------------------------------------------------------------


def test_lines_and_phases_reach_the_start(ctx, seen):
    """``log`` passes message and fields on, ``phase`` times a step under its name."""
    with ctx.phase("tokenizer"):
        ctx.log("ready", size=3)
    assert seen == ["tokenizer", ("ready", {"size": 3})]


def test_a_phase_of_the_users_own_is_on_the_timeline(monkeypatch):
    """A step timed in ``init`` is a span of the start record."""
    monkeypatch.setenv("COLDSTART_LOG", "off")

    def init(ctx, state):
        with ctx.phase("normalise"):
            return state

    handler = coldstart("spans", load=lambda: 1, init=init)(lambda event, model: model)
    handler({"input": 0})
    spans = handler.__coldstart__.ready_worker.record["spans"]
    assert [span["track"] for span in spans if span["name"] == "normalise"] == ["phase"]


# --- pools -----------------------------------------------------------------------------------------------------------


def test_a_pool_is_the_starts(ctx, seen):
    """A pool is asked of the start, as a KV cache unless ``kind=`` says otherwise."""
    ctx.pool("cache", (2, 8), "float32")
    ctx.pool("work", [4], "int8", kind="activations")
    assert seen == [("cache", (2, 8), "float32", "kv_cache"), ("work", [4], "int8", "activations")]
