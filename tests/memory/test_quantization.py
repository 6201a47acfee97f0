"""8-bit payloads and scales: error bounds, identities, edges, and agreement of parts with the whole."""

from __future__ import annotations

import pytest
import torch

from hsa_ultralong.memory.quantization import FORMATS, bytes_per_token, decode, encode, payload_dtype, row_bytes
from hsa_ultralong.ops import ChunkVisibility, chunk_topk

EIGHT_BIT = ("int8", "fp8")


def round_trip(x: torch.Tensor, format: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return decode(*encode(x, format), dtype)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1.0, 1e4, 1e30])
def test_int8_is_off_by_half_a_scale_at_most(magnitude):
    x = torch.randn(5, 64, 3, 16) * magnitude
    payload, scales = encode(x, "int8")
    error = (x - decode(payload, scales, torch.float32)).abs()
    assert bool((error <= scales.float()[..., None] * 0.5001).all())
    assert bool((error.amax(-1) <= x.abs().amax(-1) / 253).all())


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
def test_fp8_is_off_by_a_sixteenth_at_most(magnitude):
    x = torch.randn(5, 64, 3, 16) * magnitude
    payload, scales = encode(x, "fp8")
    error = (x - decode(payload, scales, torch.float32)).abs()
    assert bool((error <= torch.maximum(x.abs() / 16, scales.float()[..., None] / 1024) * 1.0001).all())


@pytest.mark.parametrize(("format", "limit"), [("int8", 0.008), ("fp8", 0.03), ("bf16", 0.002)])
def test_root_mean_square_error_of_normal_numbers(format, limit):
    x = torch.randn(64, 64, 1, 64)
    error = (x - round_trip(x, format)).square().mean() / x.square().mean()
    assert error.sqrt() < limit


@pytest.mark.parametrize("format", ["fp32", "fp16", "bf16"])
def test_wide_formats_are_casts_without_scales(format):
    x = torch.randn(3, 64, 2, 8)
    payload, scales = encode(x, format)
    assert scales is None and payload.dtype == payload_dtype(format)
    assert torch.equal(payload, x.to(payload.dtype))
    assert torch.equal(decode(payload, None, torch.float32), x.to(payload.dtype).float())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(0, 64, 1, 64), (3, 7, 2, 5), (1, 1, 1, 1), (4, 0, 2, 8), (9,), (2, 3, 4, 5, 6)])
def test_any_shape_comes_back_in_its_shape(format, shape):
    x = torch.randn(shape)
    payload, scales = encode(x, format)
    assert payload.shape == x.shape and (scales is None or scales.shape == shape[:-1])
    back = decode(payload, scales, torch.bfloat16)
    assert back.shape == x.shape and back.dtype == torch.bfloat16
    torch.testing.assert_close(back.float(), x, rtol=0.07, atol=0.05)


@pytest.mark.parametrize("format", EIGHT_BIT)
def test_zeros_and_equal_rows_come_back_exactly(format):
    assert torch.equal(round_trip(torch.zeros(2, 64, 1, 8), format), torch.zeros(2, 64, 1, 8))
    # all numbers of a row are its maximum: only the rounding of the bf16 scale is left
    x = torch.tensor([-3.7, 0.2, 1000.0])[:, None].expand(3, 8)
    torch.testing.assert_close(round_trip(x, format), x, rtol=2**-8, atol=0.0)
    powers = 127.0 * torch.tensor([0.25, -2.0, 1.0])[:, None].expand(3, 8)
    assert torch.equal(round_trip(powers, "int8"), powers)


@pytest.mark.parametrize("format", EIGHT_BIT)
def test_extreme_numbers_stay_finite(format):
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([[largest, -largest, 1.0, 0.0], [1e-45, -1e-45, 0.0, 0.0], [1e-37, 5e-38, 0.0, 0.0]])
    payload, scales = encode(x, format)
    back = decode(payload, scales, torch.float32)
    assert bool(back.isfinite().all()) and bool(payload.float().isfinite().all())
    torch.testing.assert_close(back[0], x[0], rtol=0.01, atol=1e30)
    torch.testing.assert_close(back[1:], x[1:], rtol=0.0, atol=1e-37)


@pytest.mark.parametrize("format", EIGHT_BIT)
def test_an_outlier_harms_its_own_row_only(format):
    x = torch.randn(4, 64, 2, 16)
    expected = round_trip(x, format)
    x[1, 5, 0, 3] = 1e6
    changed = (round_trip(x, format) != expected).any(-1)
    assert changed.sum() == 1 and bool(changed[1, 5, 0])


@pytest.mark.parametrize("format", FORMATS)
def test_a_part_encodes_as_in_the_whole(format):
    x = torch.randn(6, 64, 2, 16)
    payload, scales = encode(x, format)
    part, part_scales = encode(x[2:4], format)
    assert torch.equal(part.float(), payload[2:4].float())
    assert scales is None or torch.equal(part_scales, scales[2:4])


@pytest.mark.parametrize("format", FORMATS)
def test_encoding_again_changes_at_most_one_step(format):
    x = torch.randn(4, 64, 1, 64)
    once = round_trip(x, format)
    _, scales = encode(x, format)
    step = torch.zeros(4, 64, 1, 1) if scales is None else scales.float()[..., None]
    twice = round_trip(once, format)
    limit = step if format != "fp8" else torch.maximum(once.abs() / 16, step / 1024)
    assert bool(((twice - once).abs() <= limit * 1.01).all())


@pytest.mark.parametrize("format", EIGHT_BIT)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decoding_rounds_once(format, dtype):
    payload, scales = encode(torch.randn(8, 64, 1, 64) * 5, format)
    assert torch.equal(decode(payload, scales, dtype), decode(payload, scales, torch.float32).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_of_the_input_matters_only_through_its_numbers(dtype):
    x = torch.randn(3, 64, 1, 32).to(dtype)
    for a, b in zip(encode(x, "int8"), encode(x.float(), "int8"), strict=True):
        assert torch.equal(a, b)


def test_int8_landmarks_keep_the_chosen_chunks():
    landmarks = torch.randn(2048, 2, 128)
    query = torch.randn(1, 16, 2, 128)
    see = ChunkVisibility(
        torch.zeros(1, 16, dtype=torch.int32),
        torch.zeros(1, 16, dtype=torch.int32),
        torch.full((1, 2048), -1, dtype=torch.int32),
        torch.zeros(1, 2048, dtype=torch.int32),
    )
    exact, _ = chunk_topk(query, landmarks[None], see, topk=32)
    found, _ = chunk_topk(query, round_trip(landmarks, "int8")[None], see, topk=32)
    recall = (exact[..., :, None] == found[..., None, :]).any(-1).float().mean()
    assert recall > 0.97


def test_bytes_of_a_token_are_those_of_the_tensors():
    k, landmark = torch.randn(1, 64, 1, 64), torch.randn(1, 1, 256)
    for format in FORMATS:
        parts = [*encode(k, format), *encode(k, format), *encode(landmark, format)]
        stored = sum(part.numel() * part.element_size() for part in parts if part is not None)
        size = bytes_per_token(
            format,
            format,
            chunk_size=64,
            num_memory_heads=1,
            head_dim=64,
            num_retrieval_heads=1,
            retrieval_dim=256,
        )
        assert size == stored / 64
    assert row_bytes("int8", 64) == row_bytes("fp8", 64) == 66
    assert row_bytes("bf16", 64) == 128


def test_wrong_calls_are_refused():
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match="unknown format 'int4'"):
        encode(x, "int4")
    with pytest.raises(TypeError, match="floating-point"):
        encode(x.int(), "int8")
    with pytest.raises(ValueError, match="at least one number"):
        encode(torch.randn(3, 0), "int8")
    payload, scales = encode(x, "int8")
    with pytest.raises(ValueError, match="needs scales"):
        decode(payload, None, torch.float32)
    with pytest.raises(ValueError, match="needs scales"):
        decode(payload[:1], scales, torch.float32)
    with pytest.raises(ValueError, match="has no scales"):
        decode(x, scales, torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("format", FORMATS)
def test_cuda_stores_the_same_numbers_as_the_cpu(format):
    x = torch.randn(16, 64, 2, 64)
    here, there = encode(x, format), encode(x.cuda(), format)
    assert torch.equal(here.payload.float(), there.payload.cpu().float())
    if here.scales is not None:
        assert torch.equal(here.scales, there.scales.cpu())
    assert torch.equal(decode(*here, torch.bfloat16), decode(*there, torch.bfloat16).cpu())
