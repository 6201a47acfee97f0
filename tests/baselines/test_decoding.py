"""Selection without training: budgets that hold all change nothing, smaller ones read what they say."""

import pytest
import torch

from hsa_ultralong.baselines.attention import Rope
from hsa_ultralong.baselines.decoding import Selection, read_blocks, read_pages, read_sinks
from tests.baselines.dense import rotate
from tests.baselines.test_rivals import tiny, tokens

KINDS = ("sinks", "pages", "blocks")


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_of_all_tokens_changes_nothing(kind):
    model, ids = tiny("full_rope", "full_rope"), tokens(2, 90)
    cut = tiny("full_rope", "full_rope", decoding=kind, decoding_tokens=224, decoding_tail=20)
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


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_with_a_cache_reads_what_the_whole_row_would(kind):
    # keys of one layer do not depend on what it reads
    cut, ids = tiny("full_rope", decoding=kind, decoding_tokens=16, decoding_tail=1), tokens(1, 50)
    made, grown = cut.generate(ids, max_new_tokens=8, do_sample=False), ids
    for _ in range(8):
        grown = torch.cat((grown, cut(grown, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(made, grown)


def test_sinks_stand_before_the_window():
    source = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 40, 2, 4, generator=source, dtype=torch.float64) for _ in range(3))
    places = torch.arange(40)
    turned = [rotate(x[0], places)[None] for x in (q, k)]
    out = read_sinks(turned[0][:, -3:], turned[1], v, Selection("sinks", 8, 3, 2, 4), Rope(4, 10_000.0, None))
    for row, t in enumerate((37, 38, 39)):
        read = [0, 1, *range(t - 5, t + 1)]
        keys, query = rotate(k[0, read], torch.arange(8)), rotate(q[0, t : t + 1], torch.tensor([7]))
        weights = (torch.einsum("hd,nhd->hn", query[0], keys) / 2).softmax(-1)
        torch.testing.assert_close(out[0, row], torch.einsum("hn,nhd->hd", weights, v[0, read]))


def test_pages_are_those_of_the_largest_bound():
    source = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 100, 1, 4, generator=source, dtype=torch.float64) for _ in range(3))
    out = read_pages(q[:, -1:], k, v, Selection("pages", 48, 1, 1, 4), Rope(4, 10_000.0, None))
    query = q[0, -1, 0]
    bounds = {
        page: sum(max((query[d] * k[0, j, 0, d]).item() for j in range(16 * page, 16 * page + 16)) for d in range(4))
        for page in range(6)
    }
    read = [j for page in (*sorted(bounds, key=bounds.get)[-2:], 6) for j in range(16 * page, min(16 * page + 16, 100))]
    weights = (k[0, read, 0] @ query / 2).softmax(-1)
    torch.testing.assert_close(out[0, 0, 0], weights @ v[0, read, 0])


def test_blocks_are_those_whose_representatives_fit_the_query():
    source = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 60, 2, 4, generator=source, dtype=torch.float64) for _ in range(3))
    places, size, sinks, window = torch.arange(60), 5, 2, 12
    turned_q, turned_k = (rotate(x[0], places) for x in (q, k))
    selection = Selection("blocks", 24, 1, sinks, size)  # two blocks
    out = read_blocks(turned_q[None, -1:], turned_k[None], v, selection, Rope(4, 10_000.0, None), turned_q[None])
    looked = []
    for m in range(60):
        after = range(m + 1, min(m + 1 + window, 60))
        looked.append(sum((turned_q[j] * turned_k[m]).sum().item() for j in after) / max(1, len(after)))
    far_query = rotate(q[0, 59:60], torch.tensor([window]))[0]
    blocks = [list(range(sinks + c * size, sinks + (c + 1) * size)) for c in range((60 - sinks) // size)]
    fit = {}
    for c, block in enumerate(blocks):
        if block[-1] <= 59 - window:
            stand_in = sorted(block, key=lambda m: looked[m])[-4:]
            fit[c] = sum((far_query * k[0, m]).sum().item() for m in stand_in)
    chosen = [m for c in sorted(fit, key=fit.get)[-2:] for m in blocks[c]]
    far, near = [0, 1, *chosen], list(range(60 - window, 60))
    logits = torch.cat(
        (
            torch.einsum("hd,nhd->hn", far_query, k[0, far]),
            torch.einsum("hd,nhd->hn", turned_q[59], turned_k[near]),
        ),
        -1,
    )
    wanted = torch.einsum("hn,nhd->hd", (logits / 2).softmax(-1), v[0, far + near])
    torch.testing.assert_close(out[0, 0], wanted)


def test_a_selection_is_not_trained():
    with pytest.raises(ValueError, match="without training"):
        tiny("full_rope", decoding="pages").train()(tokens(1, 5))
