from hsa_ultralong.ops.swiglu.api import refuse_fp8, swiglu_fp8

__all__ = ["refuse_fp8", "swiglu_fp8"]
