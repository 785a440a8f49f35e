"""rawattn: attention for NVIDIA Hopper GPUs, compiled at run time, with no torch in it."""

from .attention import attention, attention_varlen, prepare
from .compiler import CompileError, UnsupportedEnvironment
from .merge import merge_states

__version__ = "0.1.0"
__all__ = ["CompileError", "UnsupportedEnvironment", "attention", "attention_varlen", "merge_states", "prepare"]
