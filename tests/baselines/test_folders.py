"""A rival's folder: saved, loaded by Auto classes; what none reads is refused."""

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hsa_ultralong.baselines import LAYERS, RivalConfig, RivalForCausalLM, RivalModel
from tests.baselines.test_rivals import tiny, tokens


def test_a_saved_rival_is_loaded_by_the_auto_classes(tmp_path):
    model, ids = tiny(*LAYERS).float(), tokens(1, 30)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is RivalForCausalLM and loaded.config.layers == list(LAYERS)
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)
    assert type(AutoModel.from_pretrained(tmp_path)) is RivalModel
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == loaded.config.to_dict()
    scaled = AutoModelForCausalLM.from_pretrained(tmp_path, rope_scaling={"rope_type": "ntk", "factor": 8.0})
    assert scaled.config.rope()[0] > 10_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ["full"]}, "layers must be of full_rope, .*got 'full'"),
        ({"layers": []}, "at least one layer"),
        ({"sliding_windw": 3}, "unknown configuration key 'sliding_windw'; did you mean 'sliding_window'"),
        ({"num_sinks": 0}, "num_sinks must be >= 1"),
        ({"num_attention_heads": 3}, "must be a multiple of num_key_value_heads=2"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"rope_scaling": {"rope_type": "ntk"}}, "needs a positive factor"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type must be one of"),
        ({"layers": ["nsa"], "compression_stride": 12}, "must be multiples of compression_stride=12"),
        ({"decoding": "quest"}, "decoding must be one of full, sinks, pages, blocks"),
        ({"decoding": "pages", "decoding_tokens": 15}, "needs decoding_tokens >= 16"),
        ({"layers": ["hils"], "chunk_size": 1}, "chunk_size >= 2"),
        ({"linear_impl": "cuda"}, "linear_impl must be"),
        ({"sparse_impl": "fla"}, 'sparse_impl must be "torch" or "triton"'),
        ({"dense_tokens": -1}, "dense_tokens must be >= 0"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be > 0"),
    ],
)
def test_a_configuration_that_says_nothing_of_use_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RivalConfig(**options)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"pool_memory": True}, TypeError, "takes no pool_memory"),
        ({"output_attentions": True}, TypeError, "takes no output_attentions"),
        ({"isolate_documents": True}, ValueError, "a row per document"),
        ({"position_ids": torch.arange(6)[None]}, ValueError, "positions count the real tokens"),
        ({"attention_mask": torch.ones(1, 5)}, ValueError, r"must be a tensor \(1, 6\)"),
        ({"attention_mask": torch.full((1, 6), 2)}, ValueError, "no other numbers"),
        ({"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]]), "use_cache": True}, ValueError, "without padding"),
        ({"segment_ids": torch.zeros(1, 6), "use_cache": True}, ValueError, "without a cache"),
        ({"past_key_values": ()}, ValueError, "must be a RivalCache"),
        ({"labels": torch.zeros(1, 5, dtype=torch.long)}, ValueError, "labels must be"),
    ],
)
def test_what_a_rival_does_not_read_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        tiny("full_rope")(tokens(1, 6), **arguments)


def test_generation_refuses_padding_other_caches_and_drafts():
    model = tiny("full_rope")
    with pytest.raises(ValueError, match="without padding"):
        model.generate(tokens(2, 6), attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1]] * 2), max_new_tokens=2)
    with pytest.raises(ValueError, match="its own cache"):
        model.generate(tokens(1, 6), cache_implementation="static", max_new_tokens=2)
    with pytest.raises(ValueError, match="ssisted"):
        model.generate(tokens(1, 6), prompt_lookup_num_tokens=2, max_new_tokens=8)
