"""What counts as the weights that a memory belongs to, however they are wrapped, quantised, hooked or written."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from hsa_ultralong.inference import DecodingEngine, last_logits, memorize, memory_fingerprint
from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.models.weights import checksum, checksums, is_plain, state_key, weights_of
from hsa_ultralong.testing.factories import random_tokens, tiny_model

# of checkpoints/nano: memories on disk carry it
NANO = "fc2cf7080f285c97eb80a3d800b776150d43aad5148ce66bbbc292df7922cd2b"
QUANTISABLE = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "retrieval_dim": 32, "num_memory_heads": 2}
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def projection(model):
    return model.model.lower_layers[1].attention.q_proj


def test_plain_models_keep_the_fingerprint_of_the_memories_on_disk():
    model = HSAForCausalLM.from_pretrained("checkpoints/nano")
    assert memory_fingerprint(model) == NANO == memory_fingerprint(model.float())
    assert is_plain(model)


@pytest.mark.parametrize("options", [{}, {"num_experts": 4, "num_dense_layers": 0}, {"use_qkv_bias": True}])
def test_the_weights_of_plain_modules_are_their_state_dictionary(options):
    model = tiny_model(**options)
    found = dict(weights_of("it", model))
    assert list(found) == [f"it.{name}" for name in model.state_dict()]
    assert all(torch.equal(found[f"it.{name}"], tensor) for name, tensor in model.state_dict().items())


def write_data(weight):
    weight.data[0, 0] += 1


def write_through_numpy(weight):
    weight.detach().numpy()[0, 0] += 1


def swap_two_rows(weight):
    weight.data[[0, 1]] = weight.data[[1, 0]].clone()


def swap_two_columns(weight):
    weight.data[:, [0, 1]] = weight.data[:, [1, 0]].clone()


def other_data(weight):
    weight.data = weight.data + 1


@pytest.mark.parametrize("write", [write_data, write_through_numpy, swap_two_rows, swap_two_columns, other_data])
def test_a_changed_weight_is_seen_however_it_was_written(write):
    model = tiny_model()
    before, key = memory_fingerprint(model), checksum(projection(model).weight)
    others = [torch.ones(3, 5, dtype=torch.bfloat16), torch.ones((1 << 18) + 1)]
    whole = checksums([others[0], projection(model).weight, others[1]])
    assert whole.shape == (2, 2), "small tensors are checked together"
    memory = model.memorize(random_tokens(1, 20)[0], close=False)
    write(projection(model).weight)
    assert memory_fingerprint(model) != before
    # a GPU's way of seeing it
    assert not torch.equal(checksum(projection(model).weight), key)
    assert (checksums([others[0], projection(model).weight, others[1]]) != whole).any(1).tolist() == [False, True]
    with pytest.raises(ValueError, match="another model"):
        last_logits(model, memory)


def test_a_model_loaded_in_inference_mode_has_a_fingerprint():
    with torch.inference_mode():
        model = tiny_model()
        assert memory_fingerprint(model) == memory_fingerprint(tiny_model())


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(0, 3), torch.tensor(3.0), torch.ones(3, 3, dtype=torch.bool), torch.ones(5, dtype=torch.complex64),
        torch.ones(3, 5, dtype=torch.bfloat16), torch.ones(4, 6).T, torch.ones(2, 2).to(torch.float8_e4m3fn),
    ],
)  # fmt: skip
def test_every_kind_of_tensor_has_a_checksum(tensor):
    assert checksum(tensor).shape == (2,)
    assert state_key([("it", tensor)]) == state_key([("it", tensor.clone())]) != state_key([("it", None)])


def test_wrappers_that_change_nothing_disappear():
    model, other = tiny_model(), tiny_model()
    other.model.lower_layers[0] = torch.compile(other.model.lower_layers[0])
    other.model.lower_layers[1].compile()
    other.model.groups[0] = torch.compile(other.model.groups[0])
    assert len(other.model.upper_groups()) == 2
    for whole in (nn.DataParallel(other), torch.compile(other), torch.optim.swa_utils.AveragedModel(model)):
        assert memory_fingerprint(whole) == memory_fingerprint(model)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, torch.optim.swa_utils.AveragedModel])
def test_wrapped_models_read_and_answer_like_the_model_inside(wrap):
    model, tokens = tiny_model(), random_tokens(1, 22)[0]
    wrapped = wrap(model)
    memory, expected = memorize(wrapped, tokens, close=False), memorize(model, tokens, close=False)
    torch.testing.assert_close(last_logits(wrapped, memory), last_logits(model, expected), **EXACT)
    found = DecodingEngine(wrapped, memory, max_tokens=16).generate([tokens[:5]], 6)
    assert found == DecodingEngine(model, expected, max_tokens=16).generate([tokens[:5]], 6)


class FullyShardedDataParallel(nn.Module):
    """Called as the class of torch is, which needs processes."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def test_what_is_no_model_is_refused_in_one_line():
    model = tiny_model()
    for other in (nn.Linear(2, 2), "checkpoints/nano", None, model.model):
        with pytest.raises(TypeError, match="needs an HSAForCausalLM"):
            memorize(other, random_tokens(1, 20)[0])
    with pytest.raises(TypeError, match="HSAModel has no head"):
        memory_fingerprint(model.model)
    with pytest.raises(ValueError, match="cut over processes"):
        memorize(FullyShardedDataParallel(model), random_tokens(1, 20)[0])
    model.model.lower_layers[0] = FullyShardedDataParallel(model.model.lower_layers[0])
    with pytest.raises(ValueError, match="cut over processes"):
        memory_fingerprint(model)


def test_weights_that_are_not_in_memory_are_refused():
    model = tiny_model()
    model.model.lower_layers[0].to("meta")
    with pytest.raises(ValueError, match=r"lower.0.* not in memory"):
        memory_fingerprint(model)


def double(module, inputs, output=None):
    return output * 2 if output is not None else tuple(part * 2 for part in inputs)


@pytest.mark.parametrize("hook", [double, partial(double)])
def test_a_hook_below_the_memory_is_refused_and_one_above_is_run_or_refused(hook):
    model, tokens = tiny_model(), random_tokens(1, 20)[0]
    memory = model.memorize(tokens)
    for part in (model.model.embed_tokens, model.model.lower_layers[1].mlp, model.model.chunk_encoder):
        for register in (part.register_forward_hook, part.register_forward_pre_hook):
            handle = register(hook)
            with pytest.raises(ValueError, match="the hook"):
                model.memorize(tokens)
            handle.remove()
    group = model.model.groups[0]
    for part in (model, model.model, group, group.hsa_layer, group.hsa_layer.hsa, group.retriever):
        handle = part.register_forward_hook(hook)
        assert memory_fingerprint(model) == memory.fingerprint
        with pytest.raises(ValueError, match="does not call it"):
            DecodingEngine(model, memory)
        handle.remove()
    before = DecodingEngine(model, memory)
    model.lm_head.register_forward_hook(lambda module, inputs, output: -output)
    engine = DecodingEngine(model, memory)
    engine.start(0, tokens[:5])
    found = [engine.tokens.item(), engine.step().item()]
    generated = model.generate(tokens[None, :5], memory=memory, max_new_tokens=2, do_sample=False)
    assert found == generated[0, 5:].tolist() and before.is_captured is False
    with pytest.raises(ValueError, match="plain layers"):
        DecodingEngine(model, memory, use_graph=True)


def test_a_forward_of_somebody_elses_is_refused():
    model = tiny_model()
    layer = model.model.lower_layers[0]
    layer.forward = lambda *args: args[0]
    with pytest.raises(ValueError, match="the hook"):
        memory_fingerprint(model)


def test_hooks_of_transformers_that_only_mark_outputs_are_allowed():
    model = tiny_model()
    before = memory_fingerprint(model)
    model.enable_input_require_grads()
    assert memory_fingerprint(model) == before


def test_other_modules_count_as_they_are():
    class Scaled(nn.Linear):
        pass

    one, two, three = tiny_model(), tiny_model(), tiny_model()
    for model, factor in ((two, 1.0), (three, 3.0)):
        linear = Scaled(16, 16, bias=False)
        linear.weight, linear.factor = projection(model).weight, factor
        model.model.lower_layers[1].attention.q_proj = linear
    assert len({memory_fingerprint(model) for model in (one, two, three)}) == 3
    assert memory_fingerprint(copy.deepcopy(two)) == memory_fingerprint(two) and not is_plain(two)


def test_an_engine_refuses_to_start_after_its_model_was_changed():
    model, tokens = tiny_model(), random_tokens(1, 20)[0]
    engine = DecodingEngine(model, max_tokens=32)
    engine.start(0, tokens[:5])
    model.lm_head.weight.data[0] += 1
    with pytest.raises(ValueError, match="make a new one"):
        engine.start(0, tokens[:5])


def test_reading_leaves_the_mode_of_every_part_as_it_was():
    model = tiny_model()
    model.train()
    model.model.chunk_encoder.eval()
    before = [part.training for part in model.modules()]
    model.memorize(random_tokens(1, 20)[0])
    assert [part.training for part in model.modules()] == before


def in_8_bits(kind: str) -> HSAForCausalLM:
    model = tiny_model(dtype=torch.bfloat16, std=0.05, **QUANTISABLE)
    if kind == "torchao":
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(model.float(), quantization.Int8WeightOnlyConfig())
        return model
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for name, part in list(model.model.named_modules()):
        if type(part) is nn.Linear:
            linear = bitsandbytes.nn.Linear8bitLt(part.in_features, part.out_features, False, has_fp16_weights=False)
            linear.weight = bitsandbytes.nn.Int8Params(part.weight.data, requires_grad=False)
            model.model.set_submodule(name, linear.to("cpu"))
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["torchao", "bitsandbytes"])
def test_quantised_models_read_and_answer_and_are_told_from_others(kind):
    model, tokens = in_8_bits(kind), random_tokens(1, 30)
    before = memory_fingerprint(model)
    memory = memorize(model, tokens[0])
    assert memory.fingerprint == before == memory_fingerprint(model) == memory_fingerprint(copy.deepcopy(model))
    assert before != memory_fingerprint(tiny_model(dtype=torch.bfloat16, std=0.05, **QUANTISABLE))
    assert memory.tensors.k.dtype == model.model.embed_tokens.weight.dtype
    generated = model.generate(tokens[:, :5], memory=memory, max_new_tokens=6, do_sample=False)
    assert DecodingEngine(model, memory, max_tokens=16).generate([tokens[0, :5]], 6) == generated[:, 5:].tolist()
    model.model.lower_layers[0].attention.q_proj.weight = model.model.lower_layers[1].attention.q_proj.weight
    assert memory_fingerprint(model) != before


@pytest.mark.filterwarnings("ignore")
def test_4_bit_weights_that_change_in_use_are_refused():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = tiny_model(dtype=torch.bfloat16, **QUANTISABLE)
    linear = bitsandbytes.nn.Linear4bit(64, 64, bias=False)
    linear.weight = bitsandbytes.nn.Params4bit(projection(model).weight.data, requires_grad=False)
    model.model.lower_layers[1].attention.q_proj = linear.to("cpu")
    with pytest.raises(ValueError, match="in 8 bits"):
        memory_fingerprint(model)
