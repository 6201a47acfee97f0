"""Chunks gathered out of blocks: the numbers that were stored, whatever block, order and form."""

import pytest
import torch

from hsa_ultralong.ops._triton import is_interpreted
from hsa_ultralong.ops.chunk_gather import ChunkBlocks, gather_chunks

SHAPE = (2, 8, 1, 16)
IMPLS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(not is_interpreted(), reason="interpreter is off"))]


def build(payload_dtype, per_block=4, count=3):
    """Blocks and all that they hold in fp32."""
    generator = torch.Generator().manual_seed(0)
    blocks, parts = ChunkBlocks(per_block, torch.device("cpu")), []
    for _ in range(count):
        numbers = torch.randn(per_block, *SHAPE, generator=generator) * 20
        payload = numbers.round().to(payload_dtype) if payload_dtype == torch.int8 else numbers.to(payload_dtype)
        scales = None
        if payload_dtype.itemsize == 1:
            scales = (torch.rand(payload.shape[:-1], generator=generator) + 0.1).bfloat16()
        blocks.add(payload, scales)
        wide = payload.float()
        parts.append(wide if scales is None else wide * scales.float()[..., None])
    return blocks, torch.cat(parts)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("payload", [torch.float32, torch.float16, torch.int8, torch.float8_e4m3fn])
def test_any_order_any_block_and_nothing(payload, impl):
    blocks, everything = build(payload)
    for chunks in ([11, 0, 5, 5, -1, 4, 3], [-1], []):
        chosen = torch.tensor(chunks, dtype=torch.int32)
        found = gather_chunks(blocks, chosen, torch.float32, impl=impl)
        expected = everything[chosen.clamp_min(0).long()] * (chosen >= 0).view(-1, 1, 1, 1, 1)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_every_number_of_eight_bits_is_itself_sign_subnormals_and_nan_included(impl):
    payload = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(1, 2, 8, 1, 16)
    blocks = ChunkBlocks(1, torch.device("cpu"))
    blocks.add(payload, torch.ones(payload.shape[:-1], dtype=torch.bfloat16))
    found = gather_chunks(blocks, torch.tensor([0], dtype=torch.int32), torch.float32, impl=impl)
    assert torch.equal(found.isnan(), payload.float().isnan()) and found.isnan().sum() == 2
    assert torch.equal(found.nan_to_num(), payload.float().nan_to_num())
    assert torch.equal(found.signbit(), payload.float().signbit())


def test_eight_bits_become_sixteen_as_decoding_makes_them():
    from hsa_ultralong.memory.quantization import decode, encode

    numbers = torch.randn(4, *SHAPE)
    for format in ("int8", "fp8"):
        encoded = encode(numbers, format)
        blocks = ChunkBlocks(4, torch.device("cpu"))
        blocks.add(*encoded)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            found = gather_chunks(blocks, torch.arange(4), dtype, impl="torch")
            assert torch.equal(found, decode(*encoded, dtype))


def test_refusals():
    blocks, _ = build(torch.float32)
    with pytest.raises(ValueError, match="not available"):
        gather_chunks(blocks, torch.tensor([0]), torch.float32, impl="magic")
    with pytest.raises(ValueError, match="no blocks"):
        gather_chunks(ChunkBlocks(4, torch.device("cpu")), torch.tensor([0]), torch.float32)
