"""Sequences of different lengths, packed one after the other; the lengths stay on the device.

python examples/varlen.py
"""

import numpy as np
from cupy_attention import gpu_or_none

import rawattn

xp = gpu_or_none() or np
print("on a GPU, with CuPy" if xp is not np else "no GPU: NumPy arrays, computed by the float64 reference")

lengths = [30, 0, 70]
ends = np.concatenate([[0], np.cumsum(lengths)])
cu_seqlens = xp.asarray(ends.astype(np.int32))
rng = np.random.default_rng(0)
q, k, v = (xp.asarray(rng.standard_normal((100, heads, 64)).astype(np.float16)) for heads in (8, 2, 2))

out = rawattn.attention_varlen(q, k, v, cu_seqlens, cu_seqlens, causal=True)
for first, last in zip(ends[:-1], ends[1:], strict=True):
    alone = rawattn.attention(q[None, first:last], k[None, first:last], v[None, first:last], causal=True)[0]
    assert bool((alone == out[first:last]).all())  # a sequence's bits do not depend on its neighbours
print("packed", lengths, "->", out.shape, "each sequence as it is alone")
