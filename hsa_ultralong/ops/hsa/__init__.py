from hsa_ultralong.ops.hsa.api import hsa_attention
from hsa_ultralong.ops.hsa.indices import within
from hsa_ultralong.ops.hsa.joint import joint_attention

__all__ = ["hsa_attention", "joint_attention", "within"]
