"""What `rawattn bench` compares: rawattn, and one small adapter for each other library that may be installed.

An adapter takes CuPy arrays (B, S, H, D) and returns a call without arguments that computes on that very memory.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib import metadata
from typing import Any

import numpy as np

import rawattn
from rawattn import arrays

from . import timing

Call = Callable[[], Any]


class Implementation:
    """rawattn itself, and the interface of every adapter."""

    name = "rawattn"
    version = rawattn.__version__

    def prefill(self, q: Any, k: Any, v: Any, causal: bool) -> Call:
        return partial(rawattn.attention, q, k, v, causal=causal)

    def decode(self, q: Any, k: Any, v: Any) -> Call:
        """Attention of new queries to a full cache (B, S, Hkv, D), whose lengths the device reads."""
        lengths = timing.full_lengths(k)
        out = type(q)((*q.shape[:3], v.shape[3]), q.dtype)  # made here: a captured call must not allocate
        return partial(rawattn.attention_with_kvcache, q, k, v, cache_seqlens=lengths, out=out)

    def context(self) -> AbstractContextManager[Any]:
        """To be entered around the calls."""
        return nullcontext()

    def burst(self, call: Call, count: int) -> list[float]:
        """Microseconds of `count` calls."""
        return timing.burst(call, count)

    def capture(self, call: Call) -> Call:
        return timing.capture(call)

    def to_cupy(self, out: Any) -> Any:
        return out


class Torch(Implementation):
    """torch works on its current stream, which is the default stream as CuPy's is, and captures graphs itself, for its allocator's sake."""

    needs = "torch"

    def __init__(self) -> None:
        self.torch = importlib.import_module("torch")
        importlib.import_module(self.needs)

    def tensors(self, *xs: Any) -> list[Any]:
        def convert(x: Any) -> Any:
            dtype = self.torch.float16 if x.dtype == np.float16 else self.torch.bfloat16
            return self.torch.from_dlpack(x.view(np.int16)).view(dtype)

        return [convert(x) for x in xs]

    def capture(self, call: Call) -> Call:
        torch = self.torch
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def to_cupy(self, out: Any) -> Any:
        return arrays.as_cupy(arrays.view("out", out))


class _SDPA(Torch):
    """torch.nn.functional.scaled_dot_product_attention with one backend."""

    backend: str

    def __init__(self) -> None:
        super().__init__()
        attention = importlib.import_module("torch.nn.attention")
        self._kernel = partial(attention.sdpa_kernel, getattr(attention.SDPBackend, self.backend))
        self._attend = self.torch.nn.functional.scaled_dot_product_attention
        self.version = f"torch {self.torch.__version__} SDPA"

    def context(self) -> AbstractContextManager[Any]:
        return self._kernel()

    def prefill(self, q: Any, k: Any, v: Any, causal: bool) -> Call:
        q, k, v = (x.transpose(1, 2) for x in self.tensors(q, k, v))
        grouped = q.shape[1] != k.shape[1]
        return lambda: self._attend(q, k, v, is_causal=causal, enable_gqa=grouped).transpose(1, 2)

    def decode(self, q: Any, k: Any, v: Any) -> Call:
        q, k, v = (x.transpose(1, 2).contiguous() for x in self.tensors(q, k, v))  # (B, H, S, D), the layout of its own caches
        return lambda: self._attend(q, k, v, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


class CuDNN(_SDPA):
    name, backend = "cudnn", "CUDNN_ATTENTION"

    def __init__(self) -> None:
        super().__init__()
        self.version = f"cuDNN {self.torch.backends.cudnn.version()} through {self.version}"


class FA2(_SDPA):
    name, backend = "fa2", "FLASH_ATTENTION"


class FA3(Torch):
    name, needs = "fa3", "flash_attn_interface"

    def __init__(self) -> None:
        super().__init__()
        self._module = importlib.import_module(self.needs)
        self.version = f"FlashAttention-3 {_version('flash_attn_3', 'flash-attn-3', 'fa3-fwd')}"

    def prefill(self, q: Any, k: Any, v: Any, causal: bool) -> Call:
        call = partial(self._module.flash_attn_func, *self.tensors(q, k, v), causal=causal)
        return lambda: _first(call())

    def decode(self, q: Any, k: Any, v: Any) -> Call:
        lengths = self.torch.from_dlpack(timing.full_lengths(k))
        call = partial(self._module.flash_attn_with_kvcache, *self.tensors(q, k, v), cache_seqlens=lengths, causal=True)
        return lambda: _first(call())


class FA4(Torch):
    name, needs = "fa4", "flash_attn.cute"

    def __init__(self) -> None:
        super().__init__()
        self._attend = importlib.import_module(self.needs).flash_attn_func
        self.version = f"FlashAttention-4 {_version('flash-attn-4')}"

    def prefill(self, q: Any, k: Any, v: Any, causal: bool) -> Call:
        call = partial(self._attend, *self.tensors(q, k, v), causal=causal)
        return lambda: _first(call())

    def decode(self, q: Any, k: Any, v: Any) -> Call:
        return self.prefill(q, k, v, causal=False)


class FlashInfer(Torch):
    """Decode over pages of 16 rows, planned outside of the timing."""

    name, needs = "flashinfer", "flashinfer"
    PAGE = 16

    def __init__(self) -> None:
        super().__init__()
        self._module = importlib.import_module(self.needs)
        self.version = f"FlashInfer {_version('flashinfer-python')}"

    def prefill(self, q: Any, k: Any, v: Any, causal: bool) -> Call:
        raise NotImplementedError("compared for decode only")

    def decode(self, q: Any, k: Any, v: Any) -> Call:
        torch = self.torch
        batch, length, kv_heads, dim = k.shape
        if length % self.PAGE:
            raise NotImplementedError(f"compared at multiples of {self.PAGE} keys only")
        q, k, v = self.tensors(q, k, v)
        pages = batch * length // self.PAGE
        wrapper = self._module.BatchDecodeWithPagedKVCacheWrapper(
            torch.zeros(512 << 20, dtype=torch.uint8, device="cuda"), "NHD", use_tensor_cores=True
        )
        wrapper.plan(
            torch.arange(batch + 1, dtype=torch.int32) * (length // self.PAGE),
            torch.arange(pages, dtype=torch.int32, device="cuda"),
            torch.full((batch,), self.PAGE, dtype=torch.int32),
            q.shape[2],
            kv_heads,
            dim,
            self.PAGE,
            q_data_type=q.dtype,
            kv_data_type=k.dtype,
        )
        cache = (k.view(pages, self.PAGE, kv_heads, dim), v.view(pages, self.PAGE, kv_heads, v.shape[3]))
        rows = q[:, 0]
        return lambda: wrapper.run(rows, cache)[:, None]


class JAX(Implementation):
    """cuDNN through jax.nn. XLA has streams of its own, so calls are timed by the wall clock, and none can be captured from here."""

    name, needs = "jax", "jax"

    def __init__(self) -> None:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # it would take three quarters of the GPU's memory
        self._jax = importlib.import_module(self.needs)
        if self._jax.default_backend() != "gpu":
            raise ImportError("this JAX has no CUDA backend")
        self.version = f"JAX {self._jax.__version__}, cuDNN"

    def prefill(self, q: Any, k: Any, v: Any, causal: bool) -> Call:
        jax = self._jax
        attend = jax.jit(partial(jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn"))
        return partial(attend, *(jax.dlpack.from_dlpack(x) for x in (q, k, v)))

    def decode(self, q: Any, k: Any, v: Any) -> Call:
        raise NotImplementedError("compared for prefill only")

    def burst(self, call: Call, count: int) -> list[float]:
        return timing.wall_clock(call, self._jax.block_until_ready, count)

    def to_cupy(self, out: Any) -> Any:
        return arrays.as_cupy(arrays.view("out", out))


PEERS = {peer.name: peer for peer in (CuDNN, FA2, FA3, FA4, FlashInfer, JAX)}


def load(names: list[str]) -> tuple[list[Implementation], dict[str, str]]:
    """The peers that can be imported, and why the others cannot."""
    loaded: list[Implementation] = []
    missing: dict[str, str] = {}
    for name in names:
        try:
            for module in ("torch", PEERS[name].needs) if issubclass(PEERS[name], Torch) else (PEERS[name].needs,):
                if importlib.util.find_spec(module.partition(".")[0]) is None:
                    raise ImportError(f"{module} is not installed")
            loaded.append(PEERS[name]())
        except Exception as error:  # a library built for other versions fails in its own way; the others go on
            missing[name] = sentence(error)
    return loaded, missing


def sentence(error: BaseException) -> str:
    """The first line of what `error` says.

    >>> sentence(ImportError("x is not installed"))
    'x is not installed'
    """
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


def _first(result: Any) -> Any:
    """Releases of FlashAttention differ in whether they return the LSE with the output."""
    return result[0] if isinstance(result, tuple) else result


def _version(*distributions: str) -> str:
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "of unknown version"
