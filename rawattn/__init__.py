"""rawattn: attention for NVIDIA Hopper GPUs, compiled at run time, with no torch in it."""

from .attention import attention, attention_varlen, attention_with_kvcache, prepare
from .compiler import CompileError, UnsupportedEnvironment
from .kvcache import KVCache
from .merge import merge_states

__version__ = "0.1.0"
__all__ = [
    "CompileError",
    "KVCache",
    "UnsupportedEnvironment",
    "attention",
    "attention_varlen",
    "attention_with_kvcache",
    "merge_states",
    "prepare",
]
