"""What a transformer computes beside attention, twice with the same methods: NumpyOps for the host and CupyOps for a GPU.

Activations are (tokens, columns) arrays of the model's dtype. The residual stream is float32, for the outliers that trained models have in
it can overflow float16; so are norm weights and logits. Sums are float32 everywhere.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import ml_dtypes  # noqa: F401  makes np.dtype("bfloat16") valid
import numpy as np

from rawattn import reference
from rawattn.compiler import UnsupportedEnvironment

WORKSPACE = 32 << 20  # bytes; what cuBLAS asks for on Hopper


class NumpyOps:
    """On the host. Matrices are kept as float32, rounded to the dtype, for NumPy multiplies no 16-bit matrices at a useful speed."""

    xp: Any = np

    def __init__(self, dtype: str):
        self.dtype = np.dtype(dtype)

    def matrix(self, host: np.ndarray) -> Any:
        """A weight matrix (out, in) as linear() and embed() want it."""
        return host.astype(self.dtype).astype(np.float32)

    def linear(self, x: Any, matrix: Any, *, bias: Any = None, dtype: Any = None, add_to: Any = None) -> Any:
        """x (N, in) @ matrix.T (in, out), plus bias (out,): a new array of `dtype`, the model's by default; or added to add_to."""
        product = x.astype(np.float32) @ matrix.T
        if add_to is not None:
            add_to += product
            return add_to
        return (product if bias is None else product + bias).astype(dtype or self.dtype)

    def embed(self, matrix: Any, tokens: Any) -> Any:
        """Rows `tokens` (N,) of matrix (vocabulary, columns), as float32."""
        return matrix[tokens]

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        """x (N, columns) float32 over the root of its mean square, times weight (Zhang and Sennrich 2019, arXiv:1910.07467)."""
        return (x / np.sqrt((x * x).mean(axis=1, keepdims=True) + np.float32(eps)) * weight).astype(self.dtype)

    def rotate(self, x: Any, positions: Any, cos: Any, sin: Any, interleaved: bool) -> Any:
        """Rotary embedding (Su et al. 2021, arXiv:2104.09864) of x (N, heads, D) at positions (N,); cos, sin (positions, D / 2).

        Pairs are (0, 1), (2, 3), ... if interleaved, else (0, D / 2), (1, D / 2 + 1), ...
        """
        return reference.rotate(x, cos, sin, positions, interleaved)

    def swiglu(self, gate_up: Any) -> Any:
        """silu(gate) * up of gate_up (N, 2 columns), whose halves they are (Shazeer 2020, arXiv:2002.05202)."""
        gate, up = np.split(gate_up.astype(np.float32), 2, axis=1)
        return (gate / (1 + np.exp(-gate)) * up).astype(self.dtype)


class CupyOps:
    """On the current GPU and stream, every method safe to capture in a CUDA graph; the matrix products are cuBLAS's."""

    def __init__(self, dtype: str):
        import cupy

        self.xp: Any = cupy
        self.dtype = np.dtype(dtype)
        self._gemm = _Gemm()
        c_name = {"float16": "__half", "bfloat16": "__nv_bfloat16", "float32": "float"}[dtype]
        self._rms_norm = cupy.RawModule(
            code=RMS_NORM, options=("-std=c++17",), name_expressions=[f"rms_norm<{c_name}>"]
        ).get_function(f"rms_norm<{c_name}>")  # fmt: skip
        self._embed = cupy.ElementwiseKernel(
            "raw T matrix, raw P tokens, int64 columns",
            "float32 y",
            "y = (float)matrix[(long long)tokens[i / columns] * columns + i % columns];",
            "rawattn_embed",
        )
        self._rotate = cupy.ElementwiseKernel(
            "raw T x, raw P positions, raw T cos, raw T sin, int32 heads, int32 dim, bool interleaved",
            "T y",
            """int half = dim / 2, column = i % dim;
            int pair = interleaved ? column / 2 : column % half;
            bool first = interleaved ? column % 2 == 0 : column < half;
            long long partner = i + (first ? 1 : -1) * (interleaved ? 1 : half);
            long long entry = (long long)positions[i / ((long long)heads * dim)] * half + pair;
            float s = (float)sin[entry];
            y = (T)((float)x[i] * (float)cos[entry] + (float)x[partner] * (first ? -s : s));""",
            "rawattn_rotate",
        )
        self._swiglu = cupy.ElementwiseKernel(
            "raw T gate_up, int64 columns",
            "T y",
            """long long at = i / columns * 2 * columns + i % columns;
            float gate = (float)gate_up[at];
            y = (T)(gate / (1.0f + expf(-gate)) * (float)gate_up[at + columns]);""",
            "rawattn_swiglu",
        )

    def matrix(self, host: np.ndarray) -> Any:
        return self.xp.asarray(host.astype(self.dtype))

    def linear(self, x: Any, matrix: Any, *, bias: Any = None, dtype: Any = None, add_to: Any = None) -> Any:
        out = add_to
        if out is None:
            out = self.xp.empty((len(x), len(matrix)), dtype or self.dtype)
            if bias is not None:
                out[...] = bias
        self._gemm(x, matrix, out, add=add_to is not None or bias is not None)
        return out

    def embed(self, matrix: Any, tokens: Any) -> Any:
        columns = matrix.shape[1]
        return self._embed(matrix, tokens, columns, self.xp.empty((len(tokens), columns), np.float32))

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        out = self.xp.empty(x.shape, self.dtype)
        self._rms_norm((len(x),), (256,), (x, weight, out, np.int32(x.shape[1]), np.float32(eps)))
        return out

    def rotate(self, x: Any, positions: Any, cos: Any, sin: Any, interleaved: bool) -> Any:
        _, heads, dim = x.shape
        return self._rotate(x, positions, cos, sin, heads, dim, interleaved, self.xp.empty(x.shape, self.dtype))

    def swiglu(self, gate_up: Any) -> Any:
        columns = gate_up.shape[1] // 2
        return self._swiglu(gate_up, columns, self.xp.empty((len(gate_up), columns), self.dtype))


RMS_NORM = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>

template <typename T>
__global__ void rms_norm(const float *x, const float *weight, T *y, int columns, float eps) {  // a block of 256 threads for each row
    __shared__ float of_warp[8];
    x += (long long)blockIdx.x * columns;
    y += (long long)blockIdx.x * columns;
    float sum = 0;
    for (int j = threadIdx.x; j < columns; j += 256) sum += x[j] * x[j];
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0;
    for (int warp = 0; warp < 8; ++warp) sum += of_warp[warp];
    float factor = 1.0f / sqrtf(sum / columns + eps);
    for (int j = threadIdx.x; j < columns; j += 256) y[j] = T(x[j] * factor * weight[j]);
}
"""


class _Gemm:
    """cuBLAS with a handle of its own: CuPy's refuses to be captured in a graph, and may add up parts of a 16-bit product in 16 bits."""

    _TYPES = {"float32": 0, "float16": 2, "bfloat16": 14}  # cudaDataType
    _COMPUTE_32F, _DEFAULT_ALGORITHM, _FULL_PRECISION_SUMS, _TRANSPOSE = 68, -1, 16, 1

    def __init__(self) -> None:
        import cupy

        self._library = _cublas()
        self._current_stream = cupy.cuda.get_current_stream
        self._workspace = cupy.cuda.Memory(WORKSPACE)  # with one of its own, cuBLAS would allocate in every graph that it is captured in
        self._handle = ctypes.c_void_p()
        self._call("cublasCreate_v2", ctypes.byref(self._handle))
        self._call("cublasSetMathMode", self._handle, self._FULL_PRECISION_SUMS)

    def __call__(self, x: Any, matrix: Any, out: Any, add: bool) -> None:
        """out (N, M) = x (N, K) @ matrix (M, K).T, or added to out; all contiguous. cuBLAS, which counts columns first, sees transposes."""
        (n, k), m = x.shape, len(matrix)
        for array in (x, matrix, out):
            assert array.flags.c_contiguous
        one, beta = ctypes.c_float(1), ctypes.c_float(1 if add else 0)
        self._call("cublasSetStream_v2", self._handle, ctypes.c_void_p(self._current_stream().ptr))
        self._call("cublasSetWorkspace_v2", self._handle, ctypes.c_void_p(self._workspace.ptr), ctypes.c_size_t(WORKSPACE))
        a, b, c = ((ctypes.c_void_p(array.data.ptr), self._TYPES[array.dtype.name], row) for array, row in ((matrix, k), (x, k), (out, m)))
        self._call(
            "cublasGemmEx", self._handle, self._TRANSPOSE, 0, m, n, k, ctypes.byref(one), *a, *b, ctypes.byref(beta), *c,
            self._COMPUTE_32F, self._DEFAULT_ALGORITHM,
        )  # fmt: skip

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} failed with cuBLAS status {status}")


@functools.cache
def _cublas() -> Any:
    from cuda import pathfinder  # CuPy's way to find it, so that both load the same one

    try:
        return ctypes.CDLL(pathfinder.load_nvidia_dynamic_lib("cublas").abs_path)
    except pathfinder.DynamicLibNotFoundError as error:
        raise UnsupportedEnvironment("cuBLAS is not installed, for the matrix products; pip install nvidia-cublas-cu12.") from error
