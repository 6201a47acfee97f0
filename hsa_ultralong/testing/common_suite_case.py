"""The two debug models as transformers' common tests want to see them; run by common_suite.py inside its own tests.

Nothing is overridden and nothing skipped here: what fails is listed with its reason in tests/models/common_suite.json.
"""

from __future__ import annotations

import unittest
from typing import Any

import torch
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, ids_tensor
from transformers.models.auto import modeling_auto

from hsa_ultralong.models import HSAConfig, HSAForCausalLM, HSAModel

# the suite looks models up by name here to know what each takes; registering with the Auto classes adds no name
modeling_auto.MODEL_MAPPING_NAMES["hsa_ultralong"] = "HSAModel"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["hsa_ultralong"] = "HSAForCausalLM"


class ModelTester:
    """Two layers; rows of three chunks and a rest, of which a token keeps two."""

    batch_size, seq_length, is_training = 3, 14, True
    hidden_size, num_attention_heads, num_hidden_layers = 16, 4, 2
    vocab_size, pad_token_id, bos_token_id, eos_token_id = 99, 0, 1, 2

    def __init__(self, parent: unittest.TestCase, **options: Any) -> None:
        self.parent = parent
        self.options = options

    def get_config(self) -> HSAConfig:
        fields: dict[str, Any] = {
            "vocab_size": self.vocab_size, "hidden_size": self.hidden_size, "intermediate_size": 24,
            "num_lower_layers": 1, "num_upper_groups": 1, "num_layers_per_group": 1,
            "num_attention_heads": self.num_attention_heads, "num_key_value_heads": 2, "head_dim": 4,
            "sliding_window": 5, "hsa_sliding_window": 3, "chunk_size": 4, "chunk_topk": 2, "retrieval_dim": 8,
            "pad_token_id": self.pad_token_id, "bos_token_id": self.bos_token_id, "eos_token_id": self.eos_token_id,
        }  # fmt: skip
        return HSAConfig(**{**fields, **self.options})

    def prepare_config_and_inputs_for_common(self) -> tuple[HSAConfig, dict[str, torch.Tensor]]:
        tokens = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


class CommonSuite(ModelTesterMixin, GenerationTesterMixin):
    all_model_classes = (HSAModel, HSAForCausalLM)
    options: dict[str, Any] = {}

    def setUp(self) -> None:
        self.model_tester = ModelTester(self, **self.options)  # type: ignore[arg-type]
        self.config_tester = ConfigTester(self, config_class=HSAConfig, hidden_size=16)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()


class DenseTest(CommonSuite, unittest.TestCase):
    pass


class MixtureOfExpertsTest(CommonSuite, unittest.TestCase):
    options = {"num_experts": 4, "num_experts_per_token": 2, "moe_intermediate_size": 8}
