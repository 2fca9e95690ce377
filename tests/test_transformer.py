"""The example that compiles: a real decoder, whose cache is a pool, and which goes on alike after a restore."""

from __future__ import annotations

import importlib.util
import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from coldstart.frameworks import meta
from coldstart.manifest import manifest_from_json
from coldstart.testing import check
from tests.starts import ROOT, Project

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.demo, pytest.mark.timeout(900)]

HANDLERS = ROOT / "handlers"
ASK = {"tokens": [5, 1, 30000, 7], "count": 12}
PROMPT = [5, 1, 30000, 7, 7, 2, 12, 99]


@pytest.fixture(scope="module")
def handler() -> Any:
    """The module of handlers/transformer.py; the file of its model is found while the tests of this file run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(HANDLERS)
        spec = importlib.util.spec_from_file_location("example_transformer", HANDLERS / "transformer.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def model(handler: Any) -> Any:
    """The tiny model as ``load`` makes it."""
    return handler.load(SimpleNamespace(device="cpu", meta=meta, env=lambda _: "tiny"))


def scores(step: Any, tokens: list[int], places: list[int], cache: Any) -> Any:
    """What a call gives for the last of ``tokens`` at ``places``."""
    import torch

    with torch.no_grad():
        return step(torch.tensor([tokens]), torch.tensor(places), torch.tensor([len(tokens) - 1]), cache)


def test_it_is_the_architecture_that_it_says(model: Any) -> None:
    """With the same weights it gives the scores of transformers' Llama, which shares no code with it, at every place."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    net = type(model)(__import__("transformer_model").SHAPES["tiny"])
    net.load_state_dict(model.float().state_dict())
    model.bfloat16()
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        vocab_size=32768,
        rms_norm_eps=1e-5,
    )
    theirs = LlamaForCausalLM(config).eval()
    weights = {"model.embed_tokens.weight": net.words.weight, "lm_head.weight": net.head.weight}
    weights["model.norm.weight"] = net.norm.weight
    for number, layer in enumerate(net.layers):
        ask, widen = layer.ask.weight.split((32, 16, 16)), layer.widen.weight.chunk(2)
        parts = dict(zip(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ask, strict=True))
        parts |= {"mlp.gate_proj": widen[0], "mlp.up_proj": widen[1], "mlp.down_proj": layer.narrow.weight}
        parts |= {"self_attn.o_proj": layer.mix.weight, "input_layernorm": layer.norm.weight}
        parts["post_attention_layernorm"] = layer.step_norm.weight
        weights |= {f"model.layers.{number}.{name}.weight": weight for name, weight in parts.items()}
    theirs.load_state_dict(weights)
    with torch.no_grad():
        expected = theirs(torch.tensor([PROMPT])).logits[0]
    cache = torch.zeros(net.cache_shape)
    first = scores(net, PROMPT[:3], [0, 1, 2], cache)
    torch.testing.assert_close(first, expected[2], rtol=1e-4, atol=1e-4)
    for place in range(3, len(PROMPT)):
        torch.testing.assert_close(scores(net, [PROMPT[place]], [place], cache), expected[place], rtol=1e-4, atol=1e-4)


def test_weights_are_seeded(handler: Any, model: Any) -> None:
    """Two loads make the same weights, in bfloat16, less than 5 MB of them; ``build`` makes them without bytes."""
    import torch

    ctx = SimpleNamespace(device="cpu", meta=meta, env=lambda _: None)
    again, skeleton = handler.load(ctx).state_dict(), handler.build(ctx).state_dict()
    for name, weight in model.state_dict().items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(again[name], weight)
        assert (skeleton[name].is_meta, skeleton[name].dtype) == (True, torch.bfloat16)
        assert skeleton[name].shape == weight.shape
    assert sum(weight.nbytes for weight in model.state_dict().values()) < 5e6


def test_sizes(handler: Any) -> None:
    """The sizes are what the handler's first lines say, in bytes of bfloat16."""
    for size, gigabytes in {"500m": 1.0, "1b": 2.2, "2b": 4.0, "4b": 8.3}.items():
        net = handler.build(SimpleNamespace(meta=meta, env=lambda _, size=size: size))
        assert sum(weight.nbytes for weight in net.state_dict().values()) == pytest.approx(gigabytes * 1e9, rel=0.06)


def test_padding_and_what_was_there_before_change_nothing(handler: Any, model: Any) -> None:
    """A text goes on alike in a fresh cache and in one that another text has used, whatever the padding has left there."""
    import torch

    cache = torch.zeros(model.cache_shape, dtype=torch.bfloat16)
    found = handler.generate(model, cache, PROMPT, 20)
    handler.generate(model, cache, [9] * 100, 40)
    assert handler.generate(model, cache, PROMPT, 20) == found
    assert len(set(found)) > 10
    assert handler.generate(model, cache, [*PROMPT, *found[:5]], 15)[0] == found[5]
    with pytest.raises(ValueError, match="give 1 to 128 tokens, and ask for no more than 4096 with them"):
        handler.handler.run({"id": "a", "input": {"tokens": [1] * 129}}, (model, cache))


def test_it_restores_without_its_cache(tmp_path: Path) -> None:
    """A restored start gives the tokens of the first, from a snapshot without the cache, which is there before compile asks."""
    project = Project(tmp_path)
    project.environment = {"TORCHDYNAMO_DISABLE": "1", "TRANSFORMER_SIZE": "tiny"}  # the slow test below compiles
    target = str(HANDLERS / "transformer.py")
    first = project.run("--input", json.dumps(ASK), target=target)
    second = project.run("--input", json.dumps(ASK), target=target)
    assert (first.kind, second.kind, second.record["rung"]) == ("cold", "restored", "arrays")
    assert first.output == second.output
    assert len(set(second.output["tokens"])) > 6
    (stored,) = project.objects("manifests")
    manifest = manifest_from_json(stored.read_bytes())
    assert [(pool.name, pool.length_bytes) for pool in manifest.pools] == [("cache", 2 * 2 * 2 * 4096 * 8 * 2)]
    assert {segment.kind for segment in manifest.segments} == {"weights"}
    pool_alloc = next(phase for phase in second.record["phases"] if phase["name"] == "pool_alloc")
    assert pool_alloc["skipped"] == ""
    assert [span["track"] for span in second.record["spans"]].count("pools") == 1


@pytest.mark.slow
def test_it_compiles_to_the_same(handler: Any, model: Any) -> None:
    """Compiled, prompt and decoded tokens get the scores of the eager model within what bfloat16 can tell."""
    import torch

    caches = [torch.zeros(model.cache_shape, dtype=torch.bfloat16) for _ in range(2)]
    step = torch.compile(model, dynamic=False)
    for tokens, places in [(PROMPT, list(range(8))), ([3], [8]), ([4], [9])]:
        eager, compiled = (
            scores(each, tokens, places, cache) for each, cache in zip((model, step), caches, strict=True)
        )
        torch.testing.assert_close(compiled, eager, rtol=0.05, atol=0.05 * float(eager.abs().max()))
    assert caches[0].any()
    torch.testing.assert_close(caches[1], caches[0], rtol=0.05, atol=0.05)


@pytest.mark.slow
def test_compiled_restored_is_compiled_loaded(handler: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In processes of its own, compiling for real, a restored start answers each input like one that loaded."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("TRANSFORMER_SIZE", "tiny")
    assert check(handler.handler, inputs=[ASK, {"tokens": [1], "count": 3}]).rung == "arrays"
