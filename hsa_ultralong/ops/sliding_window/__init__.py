from hsa_ultralong.ops.sliding_window.api import sliding_window_attention

__all__ = ["sliding_window_attention"]
