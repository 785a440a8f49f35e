"""The model around attention on a GPU: its kernels and products, its graph, the real model, and attention on real activations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_llama import IDS, write_gguf

import rawattn
from rawattn.cli import check_model
from rawattn.cli.check import judge
from rawattn.llama.model import Decoder, Llama
from rawattn.llama.ops import CupyOps, NumpyOps
from rawattn.llama.weights import installed_model, open_checkpoint

cp = pytest.importorskip("cupy")

pytestmark = pytest.mark.gpu

DTYPES = ("float16", "bfloat16", "float32")


@pytest.mark.parametrize("dtype", DTYPES)
def test_operations_are_those_of_numpy(dtype):
    rng = np.random.default_rng(0)
    host, device = NumpyOps(dtype), CupyOps(dtype)
    limit = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-5}[dtype]

    def close(ours, expected):
        assert ours.shape == expected.shape and ours.dtype == expected.dtype
        np.testing.assert_allclose(ours.astype(np.float32).get(), expected.astype(np.float32), rtol=limit, atol=limit)

    x, weight = rng.standard_normal((5, 72)).astype(np.float32) * 3, rng.uniform(0.5, 1.5, 72).astype(np.float32)
    close(device.rms_norm(cp.asarray(x), cp.asarray(weight), 1e-5), host.rms_norm(x, weight, 1e-5))

    matrix, bias = (rng.standard_normal(shape).astype(np.float32) / 8 for shape in ((40, 72), 40))
    rounded = x.astype(host.dtype)
    of_host, of_device = (rounded, host.matrix(matrix)), (cp.asarray(rounded), device.matrix(matrix))
    close(device.linear(*of_device), host.linear(*of_host))
    close(device.linear(*of_device, dtype=np.float32), host.linear(*of_host, dtype=np.float32))
    close(device.linear(*of_device, bias=device.matrix(bias)), host.linear(*of_host, bias=host.matrix(bias)))
    residual = rng.standard_normal((5, 40)).astype(np.float32)
    close(device.linear(*of_device, add_to=cp.asarray(residual)), host.linear(*of_host, add_to=residual.copy()))
    close(device.swiglu(cp.asarray(rounded)), host.swiglu(rounded))
    tokens = np.array([3, 39, 0], np.int32)
    close(device.embed(of_device[1], cp.asarray(tokens)), host.embed(of_host[1], tokens))

    packed = rng.standard_normal((5, 7, 16)).astype(host.dtype)
    heads = packed[:, 2:5]
    angles = np.outer(np.arange(50), 10.0 ** -np.arange(8))
    cos, sin = np.cos(angles).astype(host.dtype), np.sin(angles).astype(host.dtype)
    positions = np.array([0, 49, 7, 7, 30], np.int32)
    on_device = cp.asarray(packed)[:, 2:5], cp.asarray(positions), cp.asarray(cos), cp.asarray(sin)
    for interleaved in (False, True):
        close(device.rotate(*on_device, interleaved), host.rotate(heads, positions, cos, sin, interleaved))


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_small_model_is_that_of_numpy(architecture, tmp_path):
    """Prefill, then steps of two sequences in one graph, which is replayed after lengths and tokens were changed."""
    checkpoint = open_checkpoint(write_gguf(tmp_path / "x.gguf", architecture))
    models = [Llama.load(checkpoint, ops) for ops in (NumpyOps("float16"), CupyOps("float16"))]
    decoders = [Decoder(model, model.new_cache(2, 20)) for model in models]
    prompts = IDS[0].tolist(), IDS[0, :5].tolist()
    for again in range(2):
        for decoder in decoders:
            for b, prompt in enumerate(prompts):
                decoder.start(b, prompt[again:])
        for _ in range(4):
            for decoder in decoders:
                decoder.step()
            host, device = decoders
            assert check_model.relative_error(device.logits.get(), host.logits) < 1e-2
            assert device.cache.lengths.tolist() == host.cache.lengths.tolist()
            device.tokens[...] = cp.asarray(host.tokens)  # close logits of a random model may change places


def test_the_installed_model_passes():
    try:
        path = installed_model()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    for claim in check_model.check_model(path, on_gpu=True, progress=lambda text: None):
        assert claim.holds, f"{claim.name}: {claim.text}"


def test_real_activations():
    """Layer 16 of SmolLM2-135M-Instruct on the validation's text: rows 224 to 255 of its queries, which turn to the first key."""
    data = np.load(Path(__file__).parent / "data" / "smollm2_layer16.npz")
    q, k, v = (cp.asarray(data[name])[None] for name in "qkv")
    figures = judge("real activations", rawattn.attention(q, k, v, causal=True)[0], cp.asarray(data["out"]))
    assert figures.passed, figures
