"""Statistics of retrieval are means over the tokens that read something."""

from __future__ import annotations

import math

import pytest
import torch

from hsa_ultralong.eval.retrieval_statistics import RetrievalStatistics
from hsa_ultralong.testing.factories import tiny_model


@torch.no_grad()
def test_retrieval_statistics_equal_a_count_by_hand():
    model = tiny_model(chunk_topk=3).eval()
    tokens = torch.randint(3, model.config.vocab_size, (2, 40))
    size, window = model.config.chunk_size, model.config.sliding_window
    statistics = RetrievalStatistics(size, window)
    for row in tokens:
        found = model(row[None], use_cache=False, output_retrieval=True).retrieval
        statistics.add(found, statistics.sample(40, "cpu"))
    retrieval = model(tokens, use_cache=False, output_retrieval=True).retrieval[0]
    entropy = distance = beyond = readers = 0.0
    for row, t, head in [(b, t, h) for b in range(2) for t in range(40) for h in range(retrieval.weights.shape[2])]:
        pairs = zip(retrieval.indices[row, t, head].tolist(), retrieval.weights[row, t, head].tolist(), strict=True)
        real = [(chunk, weight) for chunk, weight in pairs if chunk >= 0]
        readers += bool(real)
        entropy -= sum(weight * math.log(weight) for _, weight in real if weight)
        distance += sum(weight * (t - (chunk * size + size - 1)) for chunk, weight in real)
        beyond += sum(weight for chunk, weight in real if t - (chunk * size + size - 1) >= window)
    record = statistics.record()
    expected = {"entropy": entropy, "distance": distance, "beyond_window": beyond}
    for name, total in expected.items():
        assert record[name][0] == pytest.approx(total / readers, rel=1e-5)
    assert len(record["entropy"]) == len(model.model.upper_groups())
    assert RetrievalStatistics(size, window).record() == {"entropy": [], "distance": [], "beyond_window": []}


def test_a_row_without_chunks_counts_for_nothing():
    model = tiny_model()
    statistics = RetrievalStatistics(model.config.chunk_size, model.config.sliding_window)
    statistics.add(model(torch.tensor([[3, 4]]), output_retrieval=True).retrieval, torch.arange(2))
    assert statistics.record()["entropy"] == [0.0] * model.config.num_upper_groups


def test_at_most_two_thousand_tokens_are_sampled_evenly():
    for length in (1, 1024, 5000, 65_536):
        tokens = RetrievalStatistics.sample(length, "cpu")
        assert tokens[0] == 0 and len(tokens) <= 2048 and len(set(tokens.diff().tolist())) <= 1
