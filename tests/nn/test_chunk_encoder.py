"""The chunk encoder: masking of short chunks, independence of chunks, landmarks and their centre."""

from __future__ import annotations

import pytest
import torch

from hsa_ultralong.nn.chunk_encoder import rms_normalize
from hsa_ultralong.nn.rotary import apply_rotary, rotary_table
from hsa_ultralong.ops import ChunkVisibility, chunk_topk
from hsa_ultralong.testing.factories import random_tensor, tiny_model

EXACT = {"rtol": 1e-11, "atol": 1e-11}
OPTIONS = [
    {},
    {"landmark_source": "mean"},
    {"num_encoder_layers": 2},
    {"fusion": "stick_breaking"},
    {"num_memory_heads": 2, "num_retrieval_heads": 2},
    {"normalize_retrieval": False, "use_qk_norm": False},
]


def encoder(**options):
    return tiny_model(**options).model.chunk_encoder


@pytest.mark.parametrize("options", OPTIONS)
@torch.no_grad()
def test_masked_slots_of_a_short_chunk_do_not_matter(options):
    module = encoder(**options)
    hidden = random_tensor(2, 3, 4, 16)
    lengths = torch.tensor([[4, 1, 3], [2, 4, 4]], dtype=torch.int32)
    absent = torch.arange(4) >= lengths[..., None]
    noisy = hidden.masked_fill(absent[..., None], 7.0)
    present = ~absent.flatten(1)
    for left, right in zip(module(hidden, lengths)[:2], module(noisy, lengths)[:2]):
        torch.testing.assert_close(right[present], left[present], **EXACT)
    torch.testing.assert_close(module(noisy, lengths)[2], module(hidden, lengths)[2], **EXACT)


@pytest.mark.parametrize("options", OPTIONS)
def test_slots_without_a_token_may_hold_what_is_not_finite(options):
    module = encoder(**options).train()
    hidden = random_tensor(2, 3, 4, 16)
    lengths = torch.tensor([[4, 2, 0], [3, 4, 1]], dtype=torch.int32)
    spoiled = hidden.masked_fill((torch.arange(4) >= lengths[..., None])[..., None], float("nan"))
    results = []
    for part in (hidden, spoiled):
        module.landmark_center.zero_()
        leaf = part.clone().requires_grad_()
        outputs = module(leaf, lengths)
        sum(out.square().sum() for out in outputs).backward()
        results.append([*outputs, leaf.grad, module.landmark_center.clone()])
    for left, right in zip(*results, strict=True):
        assert right.isfinite().all()
        torch.testing.assert_close(right, left, **EXACT)


@torch.no_grad()
def test_a_landmark_that_is_not_finite_stays_out_of_the_centre():
    module = encoder().train()
    module.landmark_center.zero_()
    hidden = random_tensor(1, 9, 4, 16)
    module(hidden[:, 1:])
    expected = module.landmark_center.clone()
    module.landmark_center.zero_()
    hidden[0, 0, 2] = float("nan")
    module(hidden)
    torch.testing.assert_close(module.landmark_center, expected, **EXACT)


@pytest.mark.parametrize("options", OPTIONS)
@torch.no_grad()
def test_full_lengths_equal_no_lengths(options):
    module = encoder(**options)
    hidden = random_tensor(2, 3, 4, 16)
    for left, right in zip(module(hidden), module(hidden, torch.full((2, 3), 4, dtype=torch.int32))):
        torch.testing.assert_close(right, left, **EXACT)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 1), (4, 4), (6, 3)])
@pytest.mark.parametrize("is_masked", [False, True])
@torch.no_grad()
def test_every_query_head_reads_the_keys_of_its_group(heads, kv_heads, is_masked):
    """The layer beside its formula, head by head."""
    layer = encoder(num_attention_heads=heads, num_key_value_heads=kv_heads, num_memory_heads=1).layers[0]
    x, rotary = random_tensor(3, 5, 16), rotary_table(5, 4, 1e4, torch.device("cpu"), torch.float64)
    present = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 1], [1, 1, 1, 0, 1]]).bool()
    normed, outputs = layer.input_norm(x), []
    q = apply_rotary(layer.q_norm(layer.q_proj(normed).unflatten(-1, (heads, 4))), rotary)
    k = apply_rotary(layer.k_norm(layer.k_proj(normed).unflatten(-1, (kv_heads, 4))), rotary)
    v = layer.v_proj(normed).unflatten(-1, (kv_heads, 4))
    for head in range(heads):
        shared = head // (heads // kv_heads)
        scores = q[:, :, head] @ k[:, :, shared].mT / 2  # (N, S + 1, S + 1)
        if is_masked:
            scores = scores.masked_fill(~present[:, None], -torch.inf)
        outputs.append(scores.softmax(-1) @ v[:, :, shared])
    expected = x + layer.o_proj(torch.cat(outputs, -1))
    expected = expected + layer.mlp(layer.mlp_norm(expected))
    found = layer(x, rotary, present[:, None, None] if is_masked else None)
    torch.testing.assert_close(found, expected, **EXACT)


@torch.no_grad()
def test_a_short_chunk_differs_from_the_full_one():
    module = encoder()
    hidden = random_tensor(1, 1, 4, 16)
    short = module(hidden, torch.tensor([[3]], dtype=torch.int32))
    assert float((short[2] - module(hidden)[2]).abs().max()) > 1e-4


@torch.no_grad()
def test_chunks_are_encoded_independently():
    module = encoder()
    hidden = random_tensor(2, 3, 4, 16)
    k, v, landmarks = module(hidden)
    for b in range(2):
        for i in range(3):
            one = module(hidden[b : b + 1, i : i + 1])
            torch.testing.assert_close(one[0], k[b : b + 1, 4 * i : 4 * i + 4], **EXACT)
            torch.testing.assert_close(one[1], v[b : b + 1, 4 * i : 4 * i + 4], **EXACT)
            torch.testing.assert_close(one[2], landmarks[b : b + 1, i : i + 1], **EXACT)


@pytest.mark.parametrize("heads", [1, 2])
def test_shapes_follow_the_heads(heads):
    k, v, landmarks = encoder(num_memory_heads=2, num_retrieval_heads=heads)(random_tensor(2, 3, 4, 16))
    assert k.shape == v.shape == (2, 12, 2, 4)
    assert landmarks.shape == (2, 3, heads, 8 // heads)


@torch.no_grad()
def test_landmarks_plus_centre_are_rms_normalised():
    module = encoder()
    landmarks = module(random_tensor(2, 3, 4, 16))[2] + module.landmark_center
    torch.testing.assert_close(
        landmarks.pow(2).mean(-1), torch.ones(2, 3, 1, dtype=torch.float64), rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_the_centre_changes_neither_selection_nor_softmax_weights():
    module = encoder()
    hidden, query = random_tensor(2, 9, 4, 16), random_tensor(2, 40, 1, 8, seed=1)
    visible = ChunkVisibility.causal(2, 40, 9, 4)
    results = []
    for scale in (1.0, 0.0, 30.0):
        module.landmark_center.copy_(random_tensor(1, 8, seed=2) * scale)
        indices, scores = chunk_topk(query, module(hidden)[2], visible, topk=3)
        results.append((indices[:, 4:], scores[:, 4:].softmax(-1)))
    for indices, weights in results[1:]:
        assert torch.equal(indices, results[0][0])
        torch.testing.assert_close(weights, results[0][1], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_the_centre_follows_the_mean_landmark_in_training_only():
    module = encoder()
    module.landmark_center.zero_()
    hidden = random_tensor(2, 9, 4, 16)
    mean = module(hidden)[2].mean((0, 1))
    assert float(module.landmark_center.abs().max()) == 0
    module.train()
    module(hidden)
    torch.testing.assert_close(module.landmark_center, mean * 0.01, **EXACT)
    # the mean of chunks that stay the same is reached in the end
    for _ in range(400):
        module(hidden)
    assert float((module.landmark_center - mean).abs().max()) < 0.03 * float(mean.abs().max())


@torch.no_grad()
def test_stick_breaking_takes_no_centre():
    module = encoder(fusion="stick_breaking")
    hidden = random_tensor(2, 3, 4, 16)
    before = module(hidden)[2]
    module.landmark_center.fill_(5.0)
    assert torch.equal(module.train()(hidden)[2], before)
    assert bool((module.landmark_center == 5.0).all())


def test_every_parameter_and_the_input_receive_a_gradient():
    module = encoder(num_encoder_layers=2)
    hidden = random_tensor(2, 3, 4, 16).requires_grad_()
    sum(part.square().sum() for part in module(hidden)).backward()
    assert float(hidden.grad.abs().max()) > 0
    missing = [name for name, p in module.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert not missing


def test_rms_normalize_keeps_fp64_and_widens_bf16():
    x = random_tensor(3, 8)
    assert rms_normalize(x).dtype == torch.float64 and rms_normalize(x.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(
        rms_normalize(x).pow(2).mean(-1), torch.ones(3, dtype=torch.float64), rtol=1e-4, atol=1e-4
    )
