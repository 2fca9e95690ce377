"""A real model of transformers, and of sentence-transformers, through bytes and back."""

from __future__ import annotations

from typing import Any

import pytest

from coldstart.frameworks import meta, survey
from tests.frameworks_arena import store

pytestmark = pytest.mark.demo


def config() -> Any:
    """A tiny BERT."""
    from transformers import BertConfig

    return BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=99,
        max_position_embeddings=40,
    )  # fmt: skip


def test_bert_answers_alike():
    """A BERT without bytes, bound, gives the hidden states of the one that was captured, in eval mode."""
    import torch
    from transformers import BertModel

    torch.manual_seed(3)
    state = BertModel(config()).eval()
    stored = store(state)
    with meta():
        skeleton = BertModel(config())
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    stored.into(skeleton)
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]])
    with torch.inference_mode():
        expected, answer = state(ids), skeleton(ids)
    assert torch.equal(expected.last_hidden_state, answer.last_hidden_state)
    assert torch.equal(expected.pooler_output, answer.pooler_output)
    assert not skeleton.training


def test_tied_heads_of_a_language_model():
    """A decoder that is tied to the embedding is one parameter with it in the bound skeleton too."""
    import torch
    from transformers import BertForMaskedLM

    torch.manual_seed(4)
    state = BertForMaskedLM(config()).eval()
    leaves = {found.leaf.path: found.leaf for found in survey(state).leaves}
    assert leaves["cls.predictions.decoder.weight"].same_as == "bert.embeddings.word_embeddings.weight"
    with meta():
        skeleton = BertForMaskedLM(config())
    store(state).into(skeleton)
    assert skeleton.get_output_embeddings().weight is skeleton.get_input_embeddings().weight
    ids = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        assert torch.equal(state(ids).logits, skeleton(ids).logits)


def test_a_sentence_transformer_around_it():
    """A pipeline of modules with a model card and configuration answers alike after binding; it needs build()."""
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers import BertModel

    class Words(torch.nn.Module):
        """A transformer with mean pooling as sentence-transformers wants it, without a tokenizer."""

        def __init__(self) -> None:
            super().__init__()
            self.bert = BertModel(config())

        def forward(self, features: dict[str, Any]) -> dict[str, Any]:
            features["sentence_embedding"] = self.bert(features["input_ids"]).last_hidden_state.mean(1)
            return features

    def make() -> Any:
        return SentenceTransformer(modules=[Words(), torch.nn.Identity()], device="cpu")

    torch.manual_seed(5)
    state = make().eval()
    stored = store(state)
    assert stored.tree is None
    with meta():
        skeleton = make()
    stored.into(skeleton)
    features = {"input_ids": torch.tensor([[1, 2, 3]])}
    with torch.inference_mode():
        expected, answer = state.forward(dict(features)), skeleton.forward(dict(features))
    assert torch.equal(expected["sentence_embedding"], answer["sentence_embedding"])
