"""scripts/lookup_recall.py: sizes are measured once, and the shortcut for a sentence agrees with lists made anew."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from hsa_ultralong import default_checkpoint
from hsa_ultralong.eval.haystack import opticks
from hsa_ultralong.memory import landmark_index
from hsa_ultralong.memory.landmark_index import LandmarkIndex
from hsa_ultralong.memory.landmark_lists import LandmarkLists
from hsa_ultralong.nn.views import ChunkTensors

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import lookup_recall
import lookup_sentences


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(landmark_index, "_FIT_CHUNKS", 128)


def sentence(landmarks: torch.Tensor, first: int, chunks: range) -> lookup_sentences.Sentence:
    nothing = landmarks[:0][None]
    return lookup_sentences.Sentence("", chunks, first, ChunkTensors(nothing, nothing, landmarks[None], *3 * [nothing]))


def test_lists_with_a_sentence_placed_find_what_lists_made_anew_find():
    directions = torch.linalg.qr(torch.randn(64, 12)).Q
    landmarks = ((torch.randn(40, 12)[torch.randint(40, (4000,))] + 0.2 * torch.randn(4000, 12)) @ directions.T)[
        :, None
    ]
    hidden = landmarks[998:1003].clone()
    hidden[2, 0] += 6 * directions[:, 3]
    one, query = sentence(hidden, 998, range(1000, 1001)), directions[:, 3][None, None, None]
    lists, sketch = LandmarkLists.build(landmarks, least_chunks=256), LandmarkIndex.build(landmarks)
    far = lists.distances(hidden[2:3]) > lists.odd_from
    assert bool(far.all())
    before = lists.members.clone(), lists.sketches.clone(), sketch.sketches.clone()
    old = landmarks[998:1003].clone()
    landmarks[998:1003] = hidden
    anew = LandmarkLists.build(landmarks, least_chunks=256).search(query, 8)[0]
    for index in (lists, sketch):
        with lookup_sentences.placed(index, one, far):
            found = index.search(query, 8)[0]
            assert 1000 in found and 1000 in anew
            if index is lists:
                assert torch.equal(lists.members[0].sort().values, torch.arange(4000, dtype=torch.int32))
                assert 1000 in lists.members[0, : lists.num_odd]
                rows = landmarks[lists.members[0].long(), 0] @ lists.basis[0]
                torch.testing.assert_close(lists.sketches[0], rows)
    landmarks[998:1003] = old
    for now, then in zip((lists.members, lists.sketches, sketch.sketches), before, strict=True):
        assert torch.equal(now, then)


def test_a_sentence_counts_by_the_chunks_that_the_exact_lookup_finds():
    one, odd = sentence(torch.zeros(3, 1, 8), 10, range(11, 13)), torch.tensor([[True], [False]])
    found = {"exact": [5, 11], "sketch": [11, 12], "lists": [12, 3]}
    found = {name: torch.tensor([[[numbers]]]) for name, numbers in found.items()}
    assert lookup_sentences.hit(one, odd, found) == (True, True, False, None)
    # one that may not be odd is not decided, unless lists are made anew
    found["exact"] = torch.tensor([[[[4, 12]]]])
    assert lookup_sentences.hit(one, odd, found) == (True, True, None, None)
    found["built"] = found["lists"]
    assert lookup_sentences.hit(one, odd, found) == (True, True, None, True)


def test_sentences_that_are_not_decided_count_as_lost():
    hits = [lookup_sentences.Hit(*one) for one in (
        (True, True, None, True), (True, True, False, True), (True, True, None, None), (True, False, True, None),
        (False, True, True, None),
    )]  # fmt: skip
    record = lookup_sentences.summed(0, hits)
    assert [record[key] for key in ("exact", "sketch", "lists", "undecided")] == [4, 3, 3, 1]
    assert [record[key] for key in ("built_anew", "built_found", "shortcut_differs")] == [2, 2, 1]


def test_the_plain_scan_finds_the_best_products(monkeypatch):
    landmarks, query = torch.randn(1000, 2, 16), torch.randn(1, 3, 2, 16)
    products = torch.einsum("btgr,cgr->btgc", query, landmarks)
    expected = products.topk(8).indices.sort().values
    assert torch.equal(lookup_recall.scan(query, landmarks, 8).sort().values.long(), expected)


def test_a_run_measures_each_size_once(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(opticks()[:50_000])
    command = [str(default_checkpoint()), "--text", str(text), "--queries", str(text), "--least", "128", "--sentences",
               "2", "--passages", "2", "--builds", "1", "--device", "cpu", "--dtype", "fp32", "-o",
               str(tmp_path / "run"), "--chunks"]  # fmt: skip
    assert lookup_recall.main([*command, "128"]) == 0
    assert lookup_recall.main([*command, "128,144"]) == 0
    assert capsys.readouterr().out.count(" 128 chunks: recall") == 1
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert [record["chunks"] for record in summary["records"]] == [128, 144]
    assert {"command", "commit", "hardware", "seed"} <= set(summary["meta"])
    for record in summary["records"]:
        assert record["exact_agrees_with_plain_scan"] == 1 and record["distinct_chunks"] == record["chunks"]
        assert set(record["query_ms"]) == {"exact", "sketch", "lists"} and record["sketch_dim"] == 32
        assert len(record["plain"]) == 4 and all(one["recall"] > 0.9 for one in record["plain"])
        layers = record["hidden"]["layers"]
        assert sum(one["exact"] for one in layers) >= 2
        assert all(one["lists"] <= one["exact"] and one["built_anew"] <= 1 for one in layers)
    with pytest.raises(SystemExit, match="seed was 0, now 1"):
        lookup_recall.main([*command, "128", "--seed", "1"])
    with pytest.raises(SystemExit, match="--sentences and --passages: 1 or more"):
        lookup_recall.main([*command, "128", "--sentences", "0"])
