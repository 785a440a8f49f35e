"""Attention of CuPy arrays, or where there is no GPU of NumPy arrays: plain, prepared, and over two sets of keys merged.

python examples/cupy_attention.py
"""

import numpy as np

import rawattn


def gpu_or_none():
    try:
        import cupy

        return cupy if cupy.cuda.runtime.getDeviceCount() else None
    except Exception:  # no CuPy, no driver
        return None


xp = gpu_or_none() or np
print("on a GPU, with CuPy" if xp is not np else "no GPU: NumPy arrays, computed by the float64 reference")

rng = np.random.default_rng(0)
q = xp.asarray(rng.standard_normal((1, 256, 8, 64)).astype(np.float16))  # (batch, queries, heads, D)
k, v = (xp.asarray(rng.standard_normal((1, 256, 2, 64)).astype(np.float16)) for _ in range(2))

out, lse = rawattn.attention(q, k, v, causal=True, return_lse=True)
print("out", out.shape, "lse", lse.shape)

op = rawattn.prepare(q, k, v, causal=True)  # for many calls on arrays of one layout: a launch, and little more
op(q, k, v, out=out)

halves = [rawattn.attention(q, k[:, part], v[:, part], return_lse=True) for part in (slice(0, 128), slice(128, 256))]
merged, _ = rawattn.merge_states([x for x, _ in halves], [x for _, x in halves])
whole = rawattn.attention(q, k, v)
print("merged halves differ from the whole by at most", float(abs(merged - whole).max()))
assert float(abs(merged - whole).max()) < 2e-3
