"""Attention inside a jitted JAX function, and under vmap.

python examples/jax_attention.py
"""

import jax
from jax import numpy as jnp

import rawattn.jax

gpu = jax.default_backend() == "gpu"
print("on a GPU, on XLA's stream" if gpu else "no GPU: on the CPU, computed by the float64 reference")


@jax.jit
def block(q, k, v):
    return rawattn.jax.attention(q * 0.5, k, v, causal=True) + 1


q = jax.random.normal(jax.random.key(0), (3, 2, 100, 8, 64), jnp.bfloat16)
k, v = jax.random.normal(jax.random.key(1), (2, 3, 2, 100, 2, 64), jnp.bfloat16)
one = block(q[0], k[0], v[0])
all_three = jax.vmap(block)(q, k, v)
print("out", one.shape, "under vmap", all_three.shape)
assert bool((all_three[0] == one).all())  # a sequence's bits do not depend on its batch
