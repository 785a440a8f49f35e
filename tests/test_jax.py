"""rawattn.jax: inside jit, vmap and shard_map it gives what rawattn.attention() gives outside."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="JAX is not installed")

import rawattn  # noqa: E402
import rawattn.jax as rj  # noqa: E402


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Any:
    try:
        return jax.devices(request.param)[0]
    except RuntimeError as error:
        pytest.skip(f"this JAX has no {request.param}: {error}")


def inputs(device: Any, *lead: int, dtype: str = "bfloat16") -> list[Any]:
    rng = np.random.default_rng(0)
    shapes = [(*lead, 2, 5, 4, 16), (*lead, 2, 7, 2, 16), (*lead, 2, 7, 2, 24)]
    return [jax.device_put(rng.standard_normal(shape).astype(dtype), device) for shape in shapes]


def assert_equal(got: Any, wanted: Any) -> None:
    assert got.dtype == wanted.dtype
    np.testing.assert_array_equal(np.asarray(got), np.asarray(wanted))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_jit_between_other_work(dtype: str, device: Any) -> None:
    """The kernel reads what XLA has just computed, and XLA reads what the kernel has written."""
    q, k, v = inputs(device, dtype=dtype)

    @jax.jit
    def step(q: Any, k: Any, v: Any) -> Any:
        out, lse = rj.attention(q * 2, k + 1, v, causal=True, window=(3, None), return_lse=True)
        return out * 2, lse + 1

    for _ in range(3):
        out, lse = step(q, k, v)
    wanted, wanted_lse = rawattn.attention(q * 2, k + 1, v, causal=True, window=(3, None), return_lse=True)
    assert_equal(out, wanted * 2)
    assert_equal(lse, wanted_lse + 1)
    assert_equal(rj.attention(q, k, v), rawattn.attention(q, k, v))  # outside of jit


@pytest.mark.parametrize("axes", [(0, 0, 0), (1, None, None), (2, 0, None)])
def test_vmap_is_a_loop(axes: tuple[int | None, ...], device: Any) -> None:
    whole = inputs(device, 3)
    given = [x[0] if axis is None else jax.numpy.moveaxis(x, 0, axis) for x, axis in zip(whole, axes, strict=True)]
    out, lse = jax.jit(jax.vmap(lambda *x: rj.attention(*x, causal=True, return_lse=True), axes))(*given)
    for i in range(3):
        one = [x[0] if axis is None else x[i] for x, axis in zip(whole, axes, strict=True)]
        wanted, wanted_lse = rawattn.attention(*one, causal=True, return_lse=True)
        assert_equal(out[i], wanted)
        assert_equal(lse[i], wanted_lse)


def test_vmap_of_vmap(device: Any) -> None:
    given = inputs(device, 2, 3)
    out = jax.vmap(jax.vmap(rj.attention))(*given)
    assert_equal(out[1, 2], rawattn.attention(*(x[1, 2] for x in given)))


def test_shard_map_by_heads() -> None:
    """In a process of its own, with two devices made of one CPU."""
    code = """
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_platforms", "cpu")
import rawattn, rawattn.jax
from jax.sharding import PartitionSpec as P
rng = np.random.default_rng(0)
q, k, v = (jax.numpy.asarray(rng.standard_normal((2, 5, heads, 16)), "bfloat16") for heads in (4, 2, 2))
mesh = jax.make_mesh((2,), ("heads",))
spec = P(None, None, "heads", None)
sharded = [jax.device_put(x, jax.sharding.NamedSharding(mesh, spec)) for x in (q, k, v)]
call = jax.shard_map(lambda *x: rawattn.jax.attention(*x, causal=True), mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
out = jax.jit(call)(*sharded)
assert len(out.devices()) == 2
np.testing.assert_array_equal(np.asarray(out), np.asarray(rawattn.attention(q, k, v, causal=True)))
"""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_keys(device: Any) -> None:
    q, k, v = inputs(device)
    out, lse = jax.jit(lambda *x: rj.attention(*x, return_lse=True))(q, k[:, :0], v[:, :0])
    assert out.shape == (2, 5, 4, 24) and not out.any() and (lse == -np.inf).all() and lse.shape == (2, 4, 5)


def test_errors_come_while_tracing() -> None:
    q, k, v = inputs(jax.devices("cpu")[0])
    for call in (rj.attention, jax.jit(rj.attention)):
        with pytest.raises(ValueError, match=r"^v has 6 rows of 2 heads; needed: 7 rows"):
            call(q, k, v[:, :6])
        with pytest.raises(TypeError, match="^q has dtype float32; needed: float16 or bfloat16"):
            call(q.astype("float32"), k, v)
    with pytest.raises(ValueError, match="^scale is 0; needed"):
        rj.attention(q, k, v, scale=0)
    with pytest.raises(TypeError, match="^k is a ndarray; needed: a jax.Array$"):
        rj.attention(q, np.asarray(k), v)
    with pytest.raises(ValueError, match="JVP|differentiation"):
        jax.grad(lambda q: rj.attention(q, k, v).sum().astype("float32"))(q)


def test_a_handler_made_with_ctypes_gets_addresses_and_gives_errors() -> None:
    """What bench/jax_dispatch.py measures buffer_callback against, on the CPU."""
    from bench.jax_dispatch import ffi_handler

    def copy(stream: int, inputs: list[int], outputs: list[int]) -> None:
        if ctypes.c_float.from_address(inputs[0]).value == 7:
            raise ValueError("seven is wrong")
        ctypes.memmove(outputs[0], inputs[1], 8)

    jax.ffi.register_ffi_target("rawattn_test_copy", ffi_handler(2, 1, copy, on_gpu=False), platform="cpu")
    call = jax.jit(lambda *x: jax.ffi.ffi_call("rawattn_test_copy", x[1])(*x))
    first, second = (jax.device_put(np.asarray(x, np.float32), jax.devices("cpu")[0]) for x in ([1, 2], [3, 4]))
    assert_equal(call(first, second), second)
    with pytest.raises(Exception, match="seven is wrong"):
        call(first + 6, second).block_until_ready()


@pytest.mark.gpu
def test_no_copy_and_no_host_round_trip() -> None:
    """The compiled program is the call alone: no transfer, no copy."""
    device = jax.devices("gpu")[0]
    text = jax.jit(lambda *x: rj.attention(*x, causal=True)).lower(*inputs(device)).compile().as_text()
    operations = set(re.findall(r" ([a-z][\w-]*)\(", text[text.index("ENTRY") :]))
    assert "custom-call" in operations
    assert not operations & {"copy", "copy-start", "transpose", "send", "recv", "infeed", "outfeed"}, text
