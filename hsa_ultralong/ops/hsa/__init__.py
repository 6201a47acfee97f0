from hsa_ultralong.ops.hsa.api import hsa_attention

__all__ = ["hsa_attention"]
