"""Selection without training: budgets that hold all change nothing, smaller ones read what they say."""

import pytest
import torch

from hsa_ultralong.baselines.attention import Rope
from hsa_ultralong.baselines.decoding import Selection, read_pages, read_sinks
from tests.baselines.dense import rotate
from tests.baselines.test_rivals import tiny, tokens

KINDS = ("sinks", "pages")


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_of_all_tokens_changes_nothing(kind):
    model, ids = tiny("full_rope", "full_rope"), tokens(2, 90)
    cut = tiny("full_rope", "full_rope", decoding=kind, decoding_tokens=112, decoding_tail=20)
    cut.load_state_dict(model.state_dict())
    torch.testing.assert_close(cut(ids).logits, model(ids).logits, rtol=1e-10, atol=1e-10)
    made = [one.generate(ids, max_new_tokens=8, do_sample=False) for one in (model, cut)]
    assert torch.equal(*made)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_last_tokens_are_cut(kind):
    model, ids = tiny("full_rope"), tokens(1, 90)
    cut = tiny("full_rope", decoding=kind, decoding_tokens=16, decoding_tail=7)
    cut.load_state_dict(model.state_dict())
    moved = (cut(ids).logits - model(ids).logits).abs().amax(-1)[0]
    assert moved[:83].max() < 1e-10 and moved[83:].min() > 1e-6


def test_sinks_stand_before_the_window():
    source = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 40, 2, 4, generator=source, dtype=torch.float64) for _ in range(3))
    places = torch.arange(40)
    turned = [rotate(x[0], places)[None] for x in (q, k)]
    out = read_sinks(turned[0][:, -3:], turned[1], v, Selection("sinks", 8, 3, 2), Rope(4, 10_000.0, None))
    for row, t in enumerate((37, 38, 39)):
        read = [0, 1, *range(t - 5, t + 1)]
        keys, query = rotate(k[0, read], torch.arange(8)), rotate(q[0, t : t + 1], torch.tensor([7]))
        weights = (torch.einsum("hd,nhd->hn", query[0], keys) / 2).softmax(-1)
        torch.testing.assert_close(out[0, row], torch.einsum("hn,nhd->hd", weights, v[0, read]))


def test_pages_are_those_of_the_largest_bound():
    source = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 100, 1, 4, generator=source, dtype=torch.float64) for _ in range(3))
    out = read_pages(q[:, -1:], k, v, Selection("pages", 48, 1, 1), Rope(4, 10_000.0, None))
    query = q[0, -1, 0]
    bounds = {
        page: sum(max((query[d] * k[0, j, 0, d]).item() for j in range(16 * page, 16 * page + 16)) for d in range(4))
        for page in range(6)
    }
    read = [j for page in (*sorted(bounds, key=bounds.get)[-2:], 6) for j in range(16 * page, min(16 * page + 16, 100))]
    weights = (k[0, read, 0] @ query / 2).softmax(-1)
    torch.testing.assert_close(out[0, 0, 0], weights @ v[0, read, 0])


def test_a_selection_is_not_trained():
    with pytest.raises(ValueError, match="without training"):
        tiny("full_rope", decoding="pages").train()(tokens(1, 5))
