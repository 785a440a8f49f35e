"""What a call of attention costs from JAX, on a GPU: three ways into XLA's programs, beside a call outside of them and JAX's own attention.

    python3 -m bench.jax_dispatch [--json FILE]

Each way is checked against float64 first. Then, at a tiny and at a usual shape, microseconds as medians and quartiles:

    issue    until a call returns to Python, the GPU being idle before the first of a burst
    call     from call to call of a burst, the last one waited for: the host's work on all threads, or the GPU's where that takes longer
    chained  a step of one program of CHAIN calls, each on what the one before gave: without jit's own dispatch
    python   of a call, from when XLA has entered Python until the kernel is launched; 0 where it enters none

`kernel` is the GPU's time for the same work, from CuPy's events. A way that fails says why, and the others go on.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # it would take three quarters of the GPU's memory

import jax
import ml_dtypes
import numpy as np
from jax.experimental.buffer_callback import buffer_callback

import rawattn
import rawattn.jax
from rawattn import reference
from rawattn.arrays import Array, contiguous_strides, dtype_name, foreign_stream
from rawattn.attention import AttentionCall
from rawattn.cli import timing
from rawattn.cli.info import machine
from rawattn.cli.peers import sentence

SHAPES = {"tiny": (1, 64, 8, 2, 128), "usual": (1, 4096, 32, 8, 128)}  # batch, length, query heads, key-value heads, D; bfloat16, causal
SAMPLES, CALLS, CHAIN = 15, 20, 32
CHECKED_ROWS, RELATIVE_L2 = 64, 1e-2
COLUMNS = ("issue", "call", "chained", "python")

Call = Callable[..., Any]


# ---- an XLA FFI handler made with ctypes


WORD = ctypes.sizeof(ctypes.c_void_p)
# Where xla/ffi/api/c_api.h has what, in words of 8 bytes. XLA_FFI_CallFrame, in which XLA_FFI_Args and XLA_FFI_Rets lie:
EXTENSION, API, CONTEXT, INPUTS, OUTPUTS, FRAME_WORDS = 1, 2, 3, 9, 14, 15
BUFFER_DATA = 3  # of XLA_FFI_Buffer
ERROR_CREATE, STREAM_GET = 6, 10  # of XLA_FFI_Api
INTERNAL = 13  # XLA_FFI_Error_Code


def words(address: int, count: int) -> Any:
    return (ctypes.c_uint64 * count).from_address(address)


def ffi_handler(inputs: int, outputs: int, run: Callable[[int, list[int], list[int]], None], on_gpu: bool = True) -> Any:
    """A PyCapsule for jax.ffi.register_ffi_target: XLA calls run(stream, addresses of the inputs, addresses of the outputs).

    It reads XLA's structures by their offsets, which no Python package promises; the caller keeps the capsule.
    """
    minor = re.search(r"#define XLA_FFI_API_MINOR (\d+)", Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h").read_text(encoding="utf-8"))
    assert minor is not None
    function = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)

    def handle(address: int) -> int | None:
        frame = words(address, FRAME_WORDS)
        if frame[EXTENSION]:  # XLA registers the handler and asks for its version: XLA_FFI_Metadata_Extension
            metadata = words(frame[EXTENSION], 4)[3]
            words(metadata, 4)[3] = int(minor[1]) << 32  # api_version.major_version is 0
            return None
        api = words(frame[API], STREAM_GET + 1)
        try:
            stream = 0
            if on_gpu:
                got = (ctypes.c_uint64 * 4)(4 * WORD, 0, frame[CONTEXT], 0)
                function(api[STREAM_GET])(ctypes.addressof(got))
                stream = got[3]
            run(
                stream,
                [words(buffer, 4)[BUFFER_DATA] for buffer in words(frame[INPUTS], inputs)],
                [words(buffer, 4)[BUFFER_DATA] for buffer in words(frame[OUTPUTS], outputs)],
            )
        except Exception as error:
            text = ctypes.create_string_buffer(str(error).encode())
            wanted = (ctypes.c_uint64 * 4)(4 * WORD, 0, ctypes.addressof(text), INTERNAL)
            return function(api[ERROR_CREATE])(ctypes.addressof(wanted))
        return None

    compiled = function(handle)
    capsule = jax.ffi.pycapsule(compiled)
    _kept.append(compiled)
    return capsule


_kept: list[Any] = []  # XLA calls its handlers until the process ends


# ---- the ways to call


class PythonTime:
    """Wraps what XLA calls, and sums up the time that it takes."""

    seconds, calls = 0.0, 0

    def take(self) -> tuple[float, int]:
        """Microseconds of a call and the number of calls, since this was last asked."""
        taken = (1e6 * self.seconds / max(self.calls, 1), self.calls)
        self.seconds, self.calls = 0.0, 0
        return taken

    def __call__(self, function: Call) -> Call:
        def timed(*arguments: Any) -> None:
            start = time.perf_counter()
            function(*arguments)
            self.seconds += time.perf_counter() - start
            self.calls += 1

        return timed


def attend(q: Any, k: Any, v: Any) -> Any:
    return rawattn.jax.attention(q, k, v, causal=True)


@contextmanager
def traced_with(python: PythonTime, **options: Any) -> Iterator[None]:
    """What is traced in here has its Python timed, and these options of buffer_callback."""
    rawattn.jax._batched.cache_clear()
    with (
        mock.patch.object(rawattn.jax, "_run", python(rawattn.jax._run)),
        mock.patch.object(rawattn.jax, "buffer_callback", partial(buffer_callback, **options)),
    ):
        yield
    rawattn.jax._batched.cache_clear()


def ffi_attention(python: PythonTime, *inputs: Any) -> Call:
    """attend() by a handler of our own, for arrays like the inputs, on GPU 0. From the addresses on it does what rawattn.jax does."""
    import cupy

    def placed(pointer: int, like: Any) -> Array:
        return Array(None, "jax", pointer, like.shape, contiguous_strides(like.shape, like.dtype.itemsize), dtype_name(like.dtype), 0)

    call = AttentionCall({name: placed(0, x) for name, x in zip("qkv", inputs, strict=True)}, True, None, None)
    q, _, v = inputs
    result = jax.ShapeDtypeStruct((*q.shape[:-1], v.shape[-1]), q.dtype)

    def run(stream: int, pointers: list[int], outputs: list[int]) -> None:
        views = {name: placed(pointer, x) for name, pointer, x in zip("qkv", pointers, inputs, strict=True)}
        with cupy.cuda.Device(0):
            call.launch(views, placed(outputs[0], result), None, foreign_stream(stream, 0))

    name = f"rawattn_bench_{q.shape[1]}"
    jax.ffi.register_ffi_target(name, ffi_handler(3, 1, python(run)), platform="CUDA")
    return lambda *arrays: jax.ffi.ffi_call(name, result)(*arrays)


def chain(call: Call) -> Call:
    def chained(q: Any, k: Any, v: Any) -> Any:
        for _ in range(CHAIN):
            q = call(q, k, v)
        return q

    return chained


def ways(python: PythonTime, *inputs: Any) -> Iterator[tuple[str, Call, Call]]:
    """A name, a call, and a chain of calls. Each is to be called before the next is asked for: it is traced then."""
    with traced_with(python):
        yield "rawattn.jax (buffer_callback)", jax.jit(attend), jax.jit(chain(attend))
    with traced_with(python, command_buffer_compatible=True):
        yield "buffer_callback in a command buffer", jax.jit(lambda *x: attend(*x)), jax.jit(chain(lambda *x: attend(*x)))
    handler = ffi_attention(python, *inputs)
    yield "XLA FFI handler by ctypes", jax.jit(handler), jax.jit(chain(handler))
    plain = partial(rawattn.attention, causal=True)
    yield "rawattn.attention, outside of jit", plain, chain(plain)
    theirs = partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    yield "jax.nn.dot_product_attention, cuDNN", jax.jit(theirs), jax.jit(chain(theirs))


# ---- measuring


def wait(result: Any) -> None:
    import cupy

    jax.block_until_ready(result)
    cupy.cuda.runtime.deviceSynchronize()  # of what JAX does not know of


def bursts(call: Callable[[], Any], count: int) -> tuple[list[float], list[float]]:
    """Microseconds a call, for each burst of `count`: until the last was issued, and until it was done."""
    issued, done = [], []
    for _ in range(SAMPLES):
        result = None
        start = time.perf_counter()
        for _ in range(count):
            result = call()
        issued.append(1e6 * (time.perf_counter() - start) / count)
        wait(result)
        done.append(1e6 * (time.perf_counter() - start) / count)
    return issued, done


def check(out: Any, expected: np.ndarray) -> float:
    """The relative L2 error of the last rows. Raises AssertionError if it is not one of rounding."""
    error = np.asarray(out)[:, -expected.shape[1] :].astype(np.float64) - expected
    relative = float(np.linalg.norm(error) / np.linalg.norm(expected))
    assert relative < RELATIVE_L2, f"wrong result: relative L2 error {relative:.2e}"
    return relative


def measure(name: str) -> list[dict[str, Any]]:
    import cupy

    batch, length, heads, kv_heads, dim = SHAPES[name]
    rng = np.random.default_rng(0)
    shapes = [(batch, length, n, dim) for n in (heads, kv_heads, kv_heads)]
    host = [rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16) for shape in shapes]
    on_gpu = [cupy.asarray(x) for x in host]
    expected = reference.attention(on_gpu[0][:, -CHECKED_ROWS:], *on_gpu[1:], causal=True).get()
    kernel = timing.summary(timing.burst(partial(rawattn.attention, *on_gpu, causal=True), 50)[5:])
    inputs = [jax.device_put(x, jax.devices("gpu")[0]) for x in host]
    text = f"bf16 causal {heads}/{kv_heads} D{dim} B{batch} S{length}"
    print(f"\n{name}: {text}; kernel {kernel['us']:.1f} us\n{'':37}{''.join(f'{column:>16}' for column in COLUMNS)}")
    cases = []
    python = PythonTime()
    for what, call, chained in ways(python, *inputs):
        case: dict[str, Any] = {"what": what, "size": name, "shape": text, "kernel": kernel}
        cases.append(case)
        try:
            case["rel_l2"] = float(f"{check(call(*inputs), expected):.3g}")
            for warm in (call, chained):
                wait([warm(*inputs) for _ in range(3)])
            python.take()
            issued, done = bursts(partial(call, *inputs), CALLS)
            inside, _ = python.take()
            _, chains = bursts(partial(chained, *inputs), 1)
        except Exception as error:
            case["error"] = sentence(error)
            print(f"{what:37}{case['error']}")
            continue
        case |= {"issue": timing.summary(issued), "call": timing.summary(done), "chained": timing.summary([x / CHAIN for x in chains])}
        cells = [f"{case[x]['us']:.1f} ±{timing.spread(case[x]):.0%}" for x in ("issue", "call", "chained")]
        case |= {"python_us": round(inside, 2), "python_calls_of_a_chain": python.take()[1] / len(chains)}
        print(f"{what:37}{''.join(f'{cell:>16}' for cell in cells)}{inside:>16.1f}", flush=True)
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine() | {"jax": jax.__version__},
        "method": __doc__,
        "cases": [case for name in SHAPES for case in measure(name)],
    }
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
