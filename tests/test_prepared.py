"""prepare() and the launchers that attention() keeps: what is checked at each call, and that a launch gets the right addresses."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest

import rawattn
from rawattn.prepared import access


def inputs(seed: int = 0, keys: int = 5) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((2, rows, heads, 16)).astype(np.float16) for rows, heads in ((3, 4), (keys, 2), (keys, 2))]


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_op_is_attention_on_new_arrays(framework: str) -> None:
    convert: Any = np.asarray
    if framework == "torch":
        convert = pytest.importorskip("torch", reason="torch is not installed").from_numpy
    options: dict[str, Any] = {"causal": True, "window": (2, 0), "scale": 0.5, "return_lse": True}
    op = rawattn.prepare(*map(convert, inputs(0)), **options)
    given = [convert(x) for x in inputs(1)]
    out = convert(np.empty((2, 3, 4, 16), np.float16))
    result, lse = op(*given, out=out)
    wanted, wanted_lse = rawattn.attention(*given, **options)
    assert result is out
    np.testing.assert_array_equal(np.asarray(result), np.asarray(wanted))
    np.testing.assert_array_equal(np.asarray(lse), np.asarray(wanted_lse))


def test_other_arrays_are_errors() -> None:
    q, k, v = inputs()
    op = rawattn.prepare(q, k, v)
    with pytest.raises(ValueError, match=r"^k has shape \(2, 4, 2, 16\); needed: \(2, 5, 2, 16\), as prepared$"):
        op(q, k[:, :4], v)
    with pytest.raises(ValueError, match=r"^q has dtype float32; needed: float16, as prepared$"):
        op(q.astype(np.float32), k, v)
    with pytest.raises(ValueError, match=r"^v has byte strides \(320, 32, 160, 2\); needed: \(320, 64, 32, 2\), as prepared$"):
        op(q, k, np.ascontiguousarray(v.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3))
    with pytest.raises(ValueError, match=r"^out has shape \(2, 3, 4, 8\); needed: \(2, 3, 4, 16\), as prepared$"):
        op(q, k, v, out=np.empty((2, 3, 4, 8), np.float16))


def test_prepare_refuses_what_attention_refuses() -> None:
    q, k, v = inputs()
    with pytest.raises(ValueError, match="^causal is 1;"):
        rawattn.prepare(q, k, v, causal=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^v has 4 rows"):
        rawattn.prepare(q, k, v[:, :4])


def unread(shape: tuple[int, ...], dtype: str = "float16", at: int = 1 << 20, device: int = 0) -> Any:
    """A CuPy array over addresses that nothing reads, so that no GPU is needed."""
    import cupy

    memory = cupy.cuda.UnownedMemory(at, 1 << 20, None, device)
    return cupy.ndarray(shape, np.dtype(dtype), cupy.cuda.MemoryPointer(memory, 0))


def test_only_cupy_arrays_laid_out_as_the_examples_match() -> None:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    found = access(cupy.ndarray)
    assert found is not None
    a, b = unread((2, 4, 8)), unread((2, 8, 4)).transpose(0, 2, 1)
    match = found.matcher([a, b])
    at = 1 << 24
    assert match([unread((2, 4, 8), at=at), b]) == [at, 1 << 20]
    kin = type("Kin", (cupy.ndarray,), {})
    others = [
        unread((4, 2, 8)),
        unread((2, 4, 8), "bfloat16"),
        unread((2, 4, 8), device=1),
        b,
        a.view(kin),
        np.zeros((2, 4, 8), np.float16),
    ]
    for other in others:
        assert match([other, b]) is None
    assert match([a, a]) is None
    assert match([a, unread((4, 8, 2)).transpose(1, 0, 2)[:2, :, :1]]) is None


@pytest.mark.parametrize("guards", [True, False])
def test_only_tensors_laid_out_as_the_examples_match(guards: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if not guards:  # a torch without this private class
        monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    found = access(torch.Tensor)
    assert found is not None
    a, b = torch.zeros(2, 4, 8, dtype=torch.float16), torch.zeros(2, 8, 4, dtype=torch.float16).transpose(1, 2)
    with torch.no_grad():
        match = found.matcher([a.clone().requires_grad_(), b])
    alike, differentiable = a.clone(), a.clone().requires_grad_()
    wanted = [alike.data_ptr(), b.data_ptr()]
    assert match([alike, b]) == wanted
    with torch.no_grad():
        assert match([alike, b]) == wanted
        assert match([differentiable, b]) == [differentiable.data_ptr(), b.data_ptr()]
    with torch.inference_mode():
        assert match([alike, b]) == wanted
        assert match([a.clone(), b]) is not None
    kin = torch.nn.Parameter(a, requires_grad=False)
    others = [differentiable, a.float(), a.bfloat16(), a.reshape(4, 2, 8), b, kin, a.to_sparse(), a.numpy()]
    for other in others:
        assert match([other, b]) is None
    assert match([a, a]) is None
    inside_vmap = []

    def look(x: Any) -> Any:
        inside_vmap.append(match([x, b]))
        return x

    torch.func.vmap(look)(torch.zeros(3, 2, 4, 8, dtype=torch.float16))
    assert inside_vmap == [None]
    assert found.matcher([kin, b])([kin, b]) is None


def gpu_inputs(framework: str, seed: int) -> list[Any]:
    if framework == "torch":
        torch = pytest.importorskip("torch", reason="torch is not installed")
        return [torch.from_numpy(x).cuda() for x in inputs(seed, keys=200)]
    import cupy

    return [cupy.asarray(x) for x in inputs(seed, keys=200)]


@pytest.mark.gpu
@pytest.mark.parametrize("framework", ["cupy", "torch"])
def test_op_on_gpu_follows_its_arguments(framework: str) -> None:
    """Call after call on other addresses, with and without out, interleaved with attention(), which keeps launchers of its own."""
    first = gpu_inputs(framework, 0)
    op = rawattn.prepare(*first, causal=True, return_lse=True)
    for seed in (1, 2):
        given = gpu_inputs(framework, seed)
        wanted, wanted_lse = rawattn.attention(*given, causal=True, return_lse=True)
        again, _ = rawattn.attention(*given, causal=True, return_lse=True)
        out = wanted * 0
        result, lse = op(*given, out=out)
        assert result is out and type(lse) is type(wanted_lse)
        assert bool((result == wanted).all()) and bool((again == wanted).all()) and bool((lse == wanted_lse).all())
        assert bool((op(*given)[0] == wanted).all())


@pytest.mark.gpu
@pytest.mark.parametrize("framework", ["cupy", "torch"])
def test_a_call_may_be_the_first_use_of_the_gpu_in_its_thread(framework: str) -> None:
    """A launch goes to the driver, which, unlike the runtime, gives a thread no context by itself."""
    import cupy

    op = rawattn.prepare(*gpu_inputs(framework, 0), causal=True)
    given = gpu_inputs(framework, 1)
    wanted = rawattn.attention(*given, causal=True)
    outs = [wanted * 0 for _ in range(3)]
    cupy.cuda.runtime.deviceSynchronize()
    calls: list[Any] = [op, op, partial(rawattn.attention, causal=True)]
    for call, out in zip(calls, outs, strict=True):
        with ThreadPoolExecutor(1) as thread:  # a new one each time
            assert thread.submit(call, *given, out=out).result() is out
    cupy.cuda.runtime.deviceSynchronize()
    assert all(bool((out == wanted).all()) for out in outs)


@pytest.mark.gpu
@pytest.mark.parametrize("framework", ["cupy", "torch"])
@pytest.mark.parametrize("out_given", [False, True])
def test_cache_calls_follow_their_arguments(framework: str, out_given: bool) -> None:
    """Call after call on other addresses. A cache_seqlens that is a number is looked at in full each time, so it says what is right."""
    import cupy

    torch = pytest.importorskip("torch", reason="torch is not installed") if framework == "torch" else None

    def to_gpu(x: np.ndarray) -> Any:
        return torch.from_numpy(x).cuda() if torch else cupy.asarray(x)

    kept = []  # so that each round's addresses are new
    for seed, length in enumerate((7, 9, 30)):
        rng = np.random.default_rng(seed)
        shapes = [(2, 3, 4, 16), (10, 8, 2, 16), (10, 8, 2, 16), (2, 3, 2, 16), (2, 3, 2, 16), (40, 8), (40, 8), (2, 3, 4, 16)]
        host = [rng.standard_normal(shape).astype(np.float16) for shape in shapes]
        table = rng.permutation(10).reshape(2, 5).astype(np.int32)
        results = []
        for lengths in (length, to_gpu(np.full(2, length, np.int32))):
            *arrays, cos, sin, out = given = [to_gpu(x) for x in host]
            options: dict[str, Any] = {"page_table": to_gpu(table), "rotary_cos": cos, "rotary_sin": sin, "return_lse": True}
            if out_given:
                options["out"] = out
            result, lse = rawattn.attention_with_kvcache(*arrays, cache_seqlens=lengths, **options)
            assert (result is out) == out_given
            results.append((result, lse, *arrays[1:3]))
            kept.append((given, options, lengths))
        for found, wanted in zip(*results, strict=True):
            assert bool((found == wanted).all())
        assert not np.array_equal(cupy.asnumpy(cupy.asarray(results[1][2])), host[1])  # rows were appended


@pytest.mark.gpu
@pytest.mark.parametrize("framework", ["cupy", "torch"])
def test_gpu_op_refuses_other_arrays_and_misaligned_ones(framework: str) -> None:
    q, k, v = gpu_inputs(framework, 0)
    op = rawattn.prepare(q, k, v)
    with pytest.raises(ValueError, match="^k has shape .*as prepared$"):
        op(q, k[:, :4], v)
    with pytest.raises(ValueError, match="^q has framework numpy; needed"):
        op(inputs()[0], k, v)
    size = 2 * 3 * 4 * 16
    misaligned = k.reshape(-1)[1 : 1 + size].reshape(q.shape)
    for call in (op, rawattn.attention, rawattn.attention):
        with pytest.raises(ValueError, match="^q starts at address .*; needed: a multiple of 16 bytes$"):
            call(misaligned, k, v)
    with pytest.raises(ValueError, match="^causal is 1;"):  # though True is kept by now
        rawattn.attention(q, k, v, causal=True)
        rawattn.attention(q, k, v, causal=1)  # type: ignore[arg-type]


@pytest.mark.gpu
def test_tensors_that_require_grad_are_refused_each_time() -> None:
    q, k, v = gpu_inputs("torch", 0)
    rawattn.attention(q, k, v)
    q.requires_grad_()
    for _ in range(2):
        with pytest.raises(ValueError, match="^q requires grad"):
            rawattn.attention(q, k, v)
