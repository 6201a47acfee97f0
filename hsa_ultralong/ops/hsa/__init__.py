from hsa_ultralong.ops.hsa.api import hsa_attention
from hsa_ultralong.ops.hsa.indices import within

__all__ = ["hsa_attention", "within"]
