"""The kernels of chosen chunks and compressed blocks equal the plain torch path, with all gradients."""

import pytest
import torch

from hsa_ultralong.baselines import RivalConfig, triton_selected
from hsa_ultralong.baselines.build import build_layer
from hsa_ultralong.baselines.selected import selected_attention
from hsa_ultralong.nn.rotary import rotary_table
from hsa_ultralong.testing.factories import randomize

pytest.importorskip("triton")
device = "cuda" if torch.cuda.is_available() else "cpu"


def operands(new, total, heads, kv_heads, seed=0):
    source = torch.Generator().manual_seed(seed)
    shapes = ((1, new, heads), (1, total, kv_heads), (1, total, kv_heads))
    return [torch.randn(*shape, 16, generator=source).to(device).requires_grad_() for shape in shapes]


def gradients(out, inputs):
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
    return [out, *torch.autograd.grad(out, inputs, seed)]


@pytest.mark.parametrize(("new", "total", "heads"), [(35, 35, (2, 1, 2)), (20, 53, (2, 2, 1))])
def test_chosen_chunks_are_read_alike(new, total, heads):
    q, k, v = inputs = operands(new, total, *heads[:2])
    own = (torch.arange(total - new, total) // 16).view(1, -1, 1, 1).expand(1, -1, heads[2], -1)
    others = torch.rand(1, new, heads[2], -(-total // 16), generator=torch.Generator().manual_seed(1)).argsort(-1)
    chosen = torch.cat((own, torch.where(others < own, others, -1)[..., :2]), -1).to(device)
    made = gradients(selected_attention(q, k, v, chosen, chunk_size=16, impl="triton"), inputs)
    wanted = gradients(selected_attention(q, k, v, chosen, chunk_size=16), inputs)
    torch.testing.assert_close(made, wanted, rtol=2e-5, atol=2e-5)


def test_blocks_that_have_ended_are_read_alike():
    q, k, v = inputs = operands(
        45, 4, 4, 2
    )  # from place 20 on; blocks of 16 tokens, one every 8, end at 16, 24, 32, 40
    made = gradients(triton_selected.block_attention_triton(q, k, v, size=16, stride=8, start=10), inputs)
    place, ends = torch.arange(10, 55), torch.arange(4) * 8 + 16
    scores = torch.einsum("bthd,bjhd->bhtj", q, k.repeat_interleave(2, 2)) / 4
    scores = scores.masked_fill((ends > place[:, None] + 1).to(device), -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    wanted = gradients(torch.einsum("bhtj,bjhd->bthd", weights, v.repeat_interleave(2, 2)), inputs)
    torch.testing.assert_close(made, wanted, rtol=2e-5, atol=2e-5)
    assert made[0][0, :5].abs().max() == 0
    assert triton_selected.block_attention_triton(q, k[:, :0], v[:, :0], size=16, stride=8, start=0).abs().max() == 0


@pytest.mark.parametrize("name", ["moba", "nsa", "infllm_v2"])
def test_layers_compute_the_same_by_kernels(name):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    choice = {"chunk_size": 16, "chunk_topk": 2, "compression_size": 8, "compression_stride": 4, "sliding_window": 5}
    layers = []
    for impl in ("torch", "triton"):
        layers.append(build_layer(RivalConfig(**sizes, **choice, sparse_impl=impl), name).attention.to(device))
    randomize(layers[0])
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(1, 40, 16, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
    rotary = rotary_table(40, 16, 10_000.0, x.device, x.dtype)
    made, wanted = (gradients(layer(x, rotary), [x, *layer.parameters()]) for layer in layers[::-1])
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)


def test_sizes_that_no_kernel_takes_are_refused():
    q, k, v = (x[..., :4] for x in operands(20, 20, 2, 1))
    with pytest.raises(ValueError, match='use sparse_impl="torch"'):
        selected_attention(q, k, v, torch.zeros(1, 20, 1, 1), chunk_size=16, impl="triton")


def test_a_device_without_kernels_is_told_how_to_read_the_model(monkeypatch):
    monkeypatch.setattr(triton_selected, "is_interpreted", lambda: False)
    q, k, v = (x.cpu() for x in operands(20, 20, 2, 1))
    chosen = torch.zeros(1, 20, 1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="hsa eval FOLDER --set sparse_impl=torch"):
        selected_attention(q, k, v, chosen, chunk_size=16, impl="triton")
