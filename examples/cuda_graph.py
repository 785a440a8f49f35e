"""A call captured in a CUDA graph, replayed with new values and new lengths.

python examples/cuda_graph.py
"""

import numpy as np
from cupy_attention import gpu_or_none

import rawattn

cupy = gpu_or_none()
xp = cupy or np
q = k = v = xp.ones((100, 4, 64), np.float16)
cu_seqlens = xp.asarray(np.array([0, 40, 100], np.int32))
out = rawattn.attention_varlen(q, k, v, cu_seqlens, cu_seqlens, causal=True)  # compiles, which a capture must not

if cupy is None:
    print("no GPU: nothing to capture; the call itself was computed by the float64 reference")
else:
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        rawattn.attention_varlen(q, k, v, cu_seqlens, cu_seqlens, causal=True, out=out)
        graph = stream.end_capture()
        cu_seqlens[1] = 70
        v *= 2
        graph.launch()
        stream.synchronize()
    print("replayed with 70 and 30 rows")
assert bool((out == v).all())
