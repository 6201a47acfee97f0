"""Segmented training: loss, gradients and statistics of the ordinary pass, with the activations of one segment."""

import pytest
import torch

from hsa_ultralong.testing.factories import MODEL_OPTIONS, random_tokens, tiny_model
from hsa_ultralong.testing.live_bytes import LiveBytes, SavedBytes
from hsa_ultralong.train.segmented import segmented_loss_backward
from hsa_ultralong.train.stages import spread_experts

SIZE = 4
# these also with segments of one chunk, shorter than a window, and with one segment for all
EVERY_WAY = {"default", "wide_hsa_window", "mixture_of_experts", "all_at_once"}


def results(model, run):
    """Loss, gradients and buffers of one pass on a fresh copy of the statistics."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.zero_grad()
    loss = run()
    found = {"loss": loss.detach()}
    found |= {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    found |= {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}
    for name, buffer in model.named_buffers():
        buffer.copy_(before[name])
    return found


def ordinary(model, batch, **more):
    def run():
        loss = model(**batch, use_cache=False, **more).loss
        loss.backward()
        return loss

    return results(model, run)


def assert_equal(found, expected):
    # pieces give zeros to what learns nothing (fusion "none"), where whole rows give no gradient
    assert found.keys() >= expected.keys() and not any(found[name].any() for name in found.keys() - expected.keys())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=f"{name} differs")


def packed(batch, lengths, total, seed=0):
    """Rows of documents that begin at chunks, padding between and behind."""
    ids, segments = random_tokens(batch, total, seed=seed), torch.full((batch, total), -1, dtype=torch.int32)
    start = 0
    for number, length in enumerate(lengths):
        segments[:, start : start + length] = number
        start += -(-length // SIZE) * SIZE
    labels = ids.masked_fill(segments < 0, -100)
    return {"input_ids": ids, "labels": labels, "segment_ids": segments}


@pytest.mark.parametrize("options", sorted(MODEL_OPTIONS))
def test_loss_and_gradients_equal_the_ordinary_pass(options):
    model = tiny_model(**MODEL_OPTIONS[options]).train()
    assert model.config.chunk_size == SIZE
    ids = random_tokens(2, 50, seed=1)
    batch = {"input_ids": ids, "labels": ids.clone()}
    batch["labels"][0, :7] = -100
    expected = ordinary(model, batch)
    for segment in (4, 12, 64) if options in EVERY_WAY else (12,):
        assert_equal(results(model, lambda n=segment: segmented_loss_backward(model, batch, n)), expected)


def test_spread_experts_are_chosen_alike_in_pieces():
    model = tiny_model(**MODEL_OPTIONS["mixture_of_experts"]).train()
    spread_experts(model, 0.5)
    ids = random_tokens(2, 50, seed=1)
    batch = {"input_ids": ids, "labels": ids.clone()}
    expected = ordinary(model, batch)
    assert_equal(results(model, lambda: segmented_loss_backward(model, batch, 12)), expected)
    spread_experts(model, 0.0)
    assert not torch.equal(ordinary(model, batch)["loss"], expected["loss"])


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("options", ["default", "mixture_of_experts", "hsa_only_layer"])
def test_documents_cross_the_borders_of_segments(options, isolated):
    model = tiny_model(**MODEL_OPTIONS[options]).train()
    batch = packed(2, [17, 3, 22, 8], 60)
    if isolated:
        batch["isolate_documents"] = torch.tensor([True, False])
    expected = ordinary(model, batch)
    for segment in (8, 20):
        assert_equal(results(model, lambda n=segment: segmented_loss_backward(model, batch, n)), expected)


def test_scale_and_divisor():
    model = tiny_model().train()
    ids = random_tokens(1, 40, seed=1)
    batch = {"input_ids": ids, "labels": ids}
    whole = ordinary(model, batch, num_items_in_batch=7)
    part = results(model, lambda: segmented_loss_backward(model, batch, 8, loss_scale=0.25, num_items=7))
    torch.testing.assert_close(part["loss"], whole["loss"])
    for name in ("model.norm.weight", "model.embed_tokens.weight", "model.lower_layers.0.attention.q_proj.weight"):
        torch.testing.assert_close(part[name] * 4, whole[name])


def test_a_frozen_lower_half_gets_no_gradients():
    model = tiny_model().train()
    for part in (model.model.embed_tokens, model.model.lower_layers, model.model.chunk_encoder):
        part.requires_grad_(False)
    ids = random_tokens(1, 40, seed=1)
    batch = {"input_ids": ids, "labels": ids}
    expected = ordinary(model, batch)
    assert not any("lower_layers" in name for name in expected)
    assert_equal(results(model, lambda: segmented_loss_backward(model, batch, 8)), expected)


def test_under_autocast_it_is_as_exact_as_the_ordinary_pass():
    model = tiny_model(dtype=torch.float32, chunk_topk=100).train()
    ids = random_tokens(2, 64, seed=1)
    batch = {"input_ids": ids, "labels": ids}

    def under(run):
        # a region of its own, as in a training step: what is cast without gradients must not stay without
        with torch.autocast("cpu", torch.bfloat16):
            return run()

    exact = ordinary(model, batch)
    usual = under(lambda: ordinary(model, batch))
    whole = under(lambda: results(model, lambda: segmented_loss_backward(model, batch, 64)))
    parts = under(lambda: results(model, lambda: segmented_loss_backward(model, batch, 16)))
    # one segment rounds where the ordinary pass rounds; several round elsewhere, not more
    for name, value in usual.items():
        torch.testing.assert_close(whole[name], value, rtol=1e-3, atol=1e-5)

    def error(found):
        return sum(float((found[name] - value).square().sum()) for name, value in exact.items()) ** 0.5

    assert 0 < error(parts) < 3 * error(usual)


@pytest.mark.parametrize("pieces", [4, 12, 32])
def test_segments_draw_the_noise_of_the_whole_row(pieces):
    model = tiny_model(gumbel_noise=True, chunk_topk=2).train()
    batch = packed(2, [17, 3, 22, 8], 60)
    torch.manual_seed(3)
    expected = ordinary(model, batch)
    torch.manual_seed(3)
    assert_equal(results(model, lambda: segmented_loss_backward(model, batch, pieces)), expected)
    torch.manual_seed(4)
    assert ordinary(model, batch)["loss"] != expected["loss"]


def test_noise_is_the_same_when_a_segment_runs_again():
    """Gradients equal finite differences of the loss under one seed: the recomputed choice is the first one."""
    model = tiny_model(gumbel_noise=True, chunk_topk=2).train()
    ids = random_tokens(1, 48, seed=1)
    batch = {"input_ids": ids, "labels": ids}

    def loss():
        torch.manual_seed(3)
        center = model.model.chunk_encoder.landmark_center.clone()
        value = segmented_loss_backward(model, batch, 12)
        model.model.chunk_encoder.landmark_center.copy_(center)
        return value

    model.zero_grad()
    first = loss()
    weight = model.model.norm.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=weight.dtype)
    slope = (weight.grad * direction).sum()
    with torch.no_grad():
        weight += 1e-6 * direction
    torch.testing.assert_close((loss() - first) / 1e-6, slope, rtol=1e-4, atol=1e-7)
    torch.manual_seed(4)
    assert segmented_loss_backward(model, batch, 12) != first


def test_saved_activations_are_those_of_a_segment():
    model = tiny_model().train()

    def most(length, run):
        ids = random_tokens(1, length, seed=1)
        with SavedBytes() as saved:
            run({"input_ids": ids, "labels": ids})
        return saved.most

    def segmented(batch):
        segmented_loss_backward(model, batch, 64)

    def plain(batch):
        model(**batch, use_cache=False).loss.backward()

    short, long = most(256, segmented), most(1024, segmented)
    # what grows is the past memory that a segment reads
    assert long < 1.5 * short < 0.5 * most(1024, plain)


def test_a_row_does_not_even_keep_the_keys_and_values_of_its_windows():
    model = tiny_model(num_lower_layers=4, num_upper_groups=1, num_layers_per_group=2).train()
    config = model.config

    def most(length):
        ids = random_tokens(1, length, seed=1)
        with LiveBytes() as live:
            segmented_loss_backward(model, {"input_ids": ids, "labels": ids}, 16)
        return live.most

    model(random_tokens(1, 8), labels=random_tokens(1, 8)).loss.backward()
    per_token = (most(224) - most(96)) / 128
    windows = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 8
    assert 2 * config.hidden_size * 8 < windows and per_token < windows


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_under_autocast_and_with_offload():
    options = {"chunk_size": 64, "hidden_size": 128, "head_dim": 32, "sliding_window": 128, "retrieval_dim": 64}
    model = tiny_model(dtype=torch.float32, **options, hsa_sliding_window=128, chunk_topk=100).cuda().train()
    ids = random_tokens(1, 4096, seed=1).cuda()
    batch = {"input_ids": ids, "labels": ids}
    found = []
    for segment, offload in ((0, False), (4096, False), (1024, False), (1024, True)):
        with torch.autocast("cuda", torch.bfloat16):
            if segment:
                run = lambda n=segment, o=offload: segmented_loss_backward(model, batch, n, offload=o)  # noqa: E731
                found.append(results(model, run))
            else:
                found.append(ordinary(model, batch))
    usual = found[0]
    for part in found[1:]:
        assert part.keys() == usual.keys()
        norms = [(float((part[n] - value).norm()), float(value.norm())) for n, value in usual.items() if "buf" not in n]
        assert sum(error for error, _ in norms) < 0.05 * sum(size for _, size in norms)


def test_refusals():
    model = tiny_model().train()
    ids = random_tokens(1, 16)
    batch = {"input_ids": ids, "labels": ids}
    with pytest.raises(ValueError, match="multiple of chunk_size"):
        segmented_loss_backward(model, batch, 6)
    with pytest.raises(ValueError, match="attention_mask"):
        segmented_loss_backward(model, {**batch, "attention_mask": torch.ones_like(ids)}, 8)
