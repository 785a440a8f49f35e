"""A decoding loop over a paged key/value cache: each step appends a row of keys and values to each sequence and attends to them all.

python examples/paged_decode.py
"""

import numpy as np
from cupy_attention import gpu_or_none

import rawattn

xp = gpu_or_none() or np
print("on a GPU, with CuPy" if xp is not np else "no GPU: NumPy arrays, computed by the float64 reference")

BATCH, PAGE_SIZE, PAGES_EACH, STEPS = 2, 16, 3, 20
HEADS, KV_HEADS, DIM = 8, 2, 64
rng = np.random.default_rng(0)


def random(*shape):
    return xp.asarray(rng.standard_normal(shape).astype(np.float16))


# Pages lie anywhere in the pool; the table says which are whose.
k_pages, v_pages = (xp.zeros((BATCH * PAGES_EACH, PAGE_SIZE, KV_HEADS, DIM), np.float16) for _ in range(2))
page_table = xp.asarray(rng.permutation(BATCH * PAGES_EACH).reshape(BATCH, PAGES_EACH).astype(np.int32))
lengths = xp.asarray(np.array([0, 7], np.int32))  # what each sequence has already; the host never reads them

for _ in range(STEPS):
    q, k, v = random(BATCH, 1, HEADS, DIM), random(BATCH, 1, KV_HEADS, DIM), random(BATCH, 1, KV_HEADS, DIM)
    out = rawattn.attention_with_kvcache(q, k_pages, v_pages, k, v, cache_seqlens=lengths, page_table=page_table)
    lengths += 1

whole = k_pages[page_table[1]].reshape(1, -1, KV_HEADS, DIM), v_pages[page_table[1]].reshape(1, -1, KV_HEADS, DIM)
wanted = rawattn.attention(q[1:], *(x[:, : 7 + STEPS] for x in whole))
print("after", STEPS, "steps, lengths", lengths.tolist(), "out", out.shape)
assert float(abs(out[1:] - wanted).max()) < 2e-3
