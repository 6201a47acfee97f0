from hsa_ultralong.models.cache_hsa import HSACache
from hsa_ultralong.models.causal_lm import HSAForCausalLM
from hsa_ultralong.models.configuration_hsa import HSAConfig
from hsa_ultralong.models.modeling_hsa import HSAModel

__all__ = ["HSACache", "HSAConfig", "HSAForCausalLM", "HSAModel"]
