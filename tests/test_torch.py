"""rawattn.torch: traced calls give what eager ones give, and transformers' models give what they give with SDPA."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import rawattn  # noqa: E402
import rawattn.torch as rt  # noqa: E402


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def inputs(device: str, rows: int = 5, keys: int = 7) -> list[Any]:
    torch.manual_seed(0)
    return [torch.randn(2, n, heads, 16).to(device, torch.float16) for n, heads in ((rows, 4), (keys, 2), (keys, 2))]


class Attention(torch.nn.Module):  # type: ignore[name-defined]
    def forward(self, q: Any, k: Any, v: Any) -> Any:
        out, lse = rt.attention(q * 2, k, v, causal=True, window=(3, None), return_lse=True)
        return out + rt.attention(q, k, v, causal="top-left"), lse + 1


def compiled(q: Any, k: Any, v: Any) -> Any:
    return torch.compile(Attention(), fullgraph=True, backend="inductor" if q.is_cuda else "aot_eager")(q, k, v)


def exported(q: Any, k: Any, v: Any) -> Any:
    program = torch.export.export(Attention(), (q, k, v))
    assert {str(node.target) for node in program.graph.nodes} >= {"rawattn.attention.default", "rawattn.attention_lse.default"}
    return program.module()(q, k, v)


@pytest.mark.parametrize("trace", [compiled, exported])
def test_traced_is_eager(trace: Any, device: str) -> None:
    given = inputs(device)
    with torch.no_grad():
        for wanted, got in zip(Attention()(*given), trace(*given), strict=True):
            torch.testing.assert_close(got, wanted, rtol=2e-3, atol=2e-3)


def test_ops_keep_torchs_rules(device: str) -> None:
    given = inputs(device)
    flat = [x.flatten(0, 1) for x in given]
    lengths = [torch.tensor([0, 3, n], dtype=torch.int32, device=device) for n in (10, 14)]
    for name in ("attention", "attention_lse"):
        torch.library.opcheck(getattr(torch.ops.rawattn, name).default, (*given, True, False, -1, 4, None))
        varlen = name.replace("attention", "attention_varlen")
        torch.library.opcheck(getattr(torch.ops.rawattn, varlen).default, (*flat, *lengths, True, False, -1, 4, 0.5))


def test_no_silent_detach() -> None:
    q, k, v = inputs("cpu")
    q.requires_grad_()
    traced = torch.compile(rt.attention, fullgraph=True, backend="aot_eager")
    for call in (rt.attention, traced, lambda *x: torch.ops.rawattn.attention(*x, False, False, -1, -1, None)):
        with pytest.raises(Exception, match="requires grad"):
            call(q, k, v)


@pytest.mark.gpu
def test_graph_replays_with_new_values() -> None:
    given = inputs("cuda")
    rt.attention(*given, causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = rt.attention(*given, causal=True)
    given[0].copy_(given[0].flip(0))
    graph.replay()
    torch.testing.assert_close(out, rawattn.attention(*given, causal=True), rtol=0, atol=0)


# ---- torch.nn.attention


def test_flash_implementation_is_sdpa(device: str) -> None:
    q, k, v = (x.transpose(1, 2) for x in inputs(device, rows=7))
    out, lse, *rest = rt.scaled_dot_product_flash_attention(q, k, v, is_causal=True, scale=0.3)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(out, wanted, rtol=2e-3, atol=2e-3)
    assert out.stride() == torch.empty_like(q).stride() and lse.shape == (2, 4, 7) and len(rest) == 7
    with pytest.raises(ValueError, match="^dropout_p is given"):
        rt.scaled_dot_product_flash_attention(q, k, v, dropout_p=0.1)


@pytest.mark.gpu
def test_torch_takes_rawattn_for_flash() -> None:
    attention = torch.nn.attention
    if not hasattr(attention, "activate_flash_attention_impl"):
        pytest.skip(f"torch {torch.__version__} lets nobody register a flash implementation; 2.11 does")
    q, k, v = (x.transpose(1, 2) for x in inputs("cuda", rows=7))
    attention.activate_flash_attention_impl("rawattn")
    try:
        with attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION):
            got = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    finally:
        attention.restore_flash_attention_impl()
    wanted = rawattn.attention(*(x.transpose(1, 2) for x in (q, k, v)), causal=True).transpose(1, 2)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


# ---- transformers

MODELS = {
    "Llama": {"num_key_value_heads": 2},
    "Qwen2": {"num_key_value_heads": 1, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "Mistral": {"num_key_value_heads": 2, "sliding_window": 6},
    "Gemma": {"num_key_value_heads": 1, "head_dim": 32},
}


def model(name: str, device: str) -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    rt.use_in_transformers()
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
    config = getattr(transformers, f"{name}Config")(**sizes, **MODELS[name], pad_token_id=0, bos_token_id=1, eos_token_id=None)
    return getattr(transformers, f"{name}ForCausalLM")(config).to(device, torch.float16).eval()


def padded(kind: str, device: str) -> dict[str, Any]:
    ids = torch.randint(2, 50, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, length in enumerate((9, 4, 7)):
        if kind == "left":
            mask[row, : 9 - length] = 0
        elif kind == "right":
            mask[row, length:] = 0
    return {"input_ids": (ids * mask).to(device), "attention_mask": mask.to(device)}


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_model_is_as_with_sdpa(name: str, padding: str, device: str) -> None:
    """Logits of a prefill and of the cached steps of generate(), judged by SDPA's on the same tokens; padding's own logits mean nothing."""
    net, given = model(name, device), padded(padding, device)
    real = given["attention_mask"].bool()

    def logits(implementation: str, **more: Any) -> Any:
        net.set_attn_implementation(implementation)
        return net(**(given | more)).logits

    torch.testing.assert_close(logits("rawattn")[real], logits("sdpa")[real], rtol=0, atol=4e-3)

    net.set_attn_implementation("rawattn")
    done = net.generate(**given, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    if padding == "right":
        return  # its steps have holes in the mask, which are SDPA's already
    longer = {
        "input_ids": done.sequences[:, :-1],
        "attention_mask": torch.nn.functional.pad(given["attention_mask"], (0, 5), value=1),
    }
    if padding == "left":
        longer["position_ids"] = (longer["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    torch.testing.assert_close(torch.stack(done.logits, 1), logits("sdpa", **longer)[:, -6:].float(), rtol=0, atol=4e-3, check_dtype=False)


@torch.no_grad()
def test_static_cache_and_right_padded_generate(device: str) -> None:
    for padding, options in (("left", {"cache_implementation": "static", "disable_compile": True}), ("right", {})):
        net, given = model("Llama", device), padded(padding, device)
        logits = []
        for implementation in ("rawattn", "sdpa"):
            net.set_attn_implementation(implementation)
            done = net.generate(**given, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True, **options)
            logits.append(done.logits[1])
        torch.testing.assert_close(*logits, rtol=0, atol=4e-3)


def test_lengths_leave_padding_alone() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from rawattn.transformers import mask

    real = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    lengths = mask(2, 1, 4, q_offset=3, attention_mask=real, device="cpu", allow_is_causal_skip=True)
    assert lengths is not None
    assert lengths[:, 0, 0].tolist() == [[0, 0, 1, 1, 1, 2, 2], [0, 2, 4, 4, 4, 8, 8]]
    assert mask(2, 4, 4, attention_mask=real.flip(1), device="cpu", allow_is_causal_skip=True) is None  # right padding, causal


def test_what_has_no_kernel_is_an_error() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from rawattn.transformers import attention

    q, k, v = (x.transpose(1, 2) for x in inputs("cpu"))
    for more in ({"softcap": 30.0}, {"dropout": 0.1}, {"s_aux": torch.ones(4)}):
        with pytest.raises(ValueError, match=f"^{next(iter(more))} is "):
            attention(torch.nn.Module(), q, k, v, None, **more)
