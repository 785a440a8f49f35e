"""rawattn in torch programs: a custom op, torch's flash backend, and an attention function for Hugging Face transformers.

attention() here works under torch.compile(fullgraph=True), torch.export and CUDA graphs, where rawattn.attention(), which wants real
tensors, cannot be traced. use_in_transformers() registers "rawattn" as an attn_implementation; importing this module registers it as a
flash implementation of torch.nn.attention, for torch.nn.attention.activate_flash_attention_impl("rawattn").
"""

from __future__ import annotations

from typing import Any

import torch

import rawattn

Window = tuple[int | None, int | None] | None

_library = torch.library.Library("rawattn", "DEF")
_OPTIONS = "bool causal, bool top_left, SymInt left, SymInt right, float? scale"


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool | str = False,
    window: Window = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """rawattn.attention() of torch tensors, as the ops rawattn::attention and rawattn::attention_lse where it is traced.

    q (B, Sq, Hq, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv), float16 or bfloat16 -> out (B, Sq, Hq, Dv), or (out, lse (B, Hq, Sq) float32).
    Options and errors are those of rawattn.attention(); gradients are not computed.

    >>> import torch, rawattn.torch
    >>> q = k = v = torch.ones(1, 4, 8, 64, dtype=torch.float16)
    >>> rawattn.torch.attention(q, k, v, causal=True).shape
    torch.Size([1, 4, 8, 64])
    """
    if type(q) is torch.Tensor and not torch.compiler.is_compiling():
        return rawattn.attention(q, k, v, causal=causal, window=window, scale=scale, return_lse=return_lse)
    op = torch.ops.rawattn.attention_lse if return_lse else torch.ops.rawattn.attention
    return op(q, k, v, *_op_options(causal, window, scale))


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    causal: bool | str = False,
    window: Window = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """rawattn.attention_varlen() of torch tensors, as the ops rawattn::attention_varlen(_lse) where it is traced.

    q (Tq, Hq, D), k (Tk, Hkv, D), v (Tk, Hkv, Dv), cu_seqlens (B + 1,) int32 -> out (Tq, Hq, Dv), or (out, lse (Hq, Tq) float32).

    >>> import torch, rawattn.torch
    >>> q = k = v = torch.ones(7, 2, 64, dtype=torch.float16)
    >>> lengths = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    >>> rawattn.torch.attention_varlen(q, k, v, lengths, lengths).shape
    torch.Size([7, 2, 64])
    """
    if type(q) is torch.Tensor and not torch.compiler.is_compiling():
        options: dict[str, Any] = {"causal": causal, "window": window, "scale": scale, "return_lse": return_lse}
        return rawattn.attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)
    op = torch.ops.rawattn.attention_varlen_lse if return_lse else torch.ops.rawattn.attention_varlen
    return op(q, k, v, cu_seqlens_q, cu_seqlens_k, *_op_options(causal, window, scale))


def _op_options(causal: bool | str, window: Window, scale: float | None) -> tuple[bool, bool, int, int, float | None]:
    left, right = (-1 if side is None else side for side in window or (None, None))
    return bool(causal), causal == "top-left", left, right, scale


def _define(name: str, varlen: bool, lse: bool) -> None:
    lengths = ", Tensor cu_seqlens_q, Tensor cu_seqlens_k" if varlen else ""
    _library.define(f"{name}(Tensor q, Tensor k, Tensor v{lengths}, {_OPTIONS}) -> {'(Tensor, Tensor)' if lse else 'Tensor'}")

    def run(*arguments: Any) -> Any:
        *tensors, causal, top_left, left, right, scale = arguments
        compute = rawattn.attention_varlen if varlen else rawattn.attention
        options: dict[str, Any] = {"causal": "top-left" if top_left else causal, "window": (left, right), "scale": scale}
        return compute(*tensors, **options, return_lse=lse)

    def fake(*arguments: Any) -> Any:
        """Shapes alone; what is wrong with an argument is said when the op runs, by the checks that all calls meet."""
        q, v = arguments[0], arguments[2]
        if torch.is_grad_enabled() and any(x.requires_grad for x in arguments[:3]):
            raise ValueError("an input requires grad; rawattn computes no gradients: use torch.no_grad()")
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        if not lse:
            return out
        return out, q.new_empty((q.shape[1], q.shape[0]) if varlen else (q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)

    _library.impl(name, run, "CPU")
    _library.impl(name, run, "CUDA")
    torch.library.register_fake(f"rawattn::{name}", fake, lib=_library)


for _name, _varlen in (("attention", False), ("attention_varlen", True)):
    _define(_name, _varlen, lse=False)
    _define(f"{_name}_lse", _varlen, lse=True)


# ---- torch.nn.attention


def flash_attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cum_seq_q: torch.Tensor | None,
    cum_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    **others: Any,
) -> tuple[Any, ...]:
    """aten::_flash_attention_forward: (B, S, H, D), or packed (T, H, D) with cum_seq_q and cum_seq_k.

    Returns output, LSE, and what a kernel with dropout would: two of RNG state and a debug mask.

    >>> import torch, rawattn.torch
    >>> q = k = v = torch.ones(1, 4, 8, 64, dtype=torch.float16)
    >>> out, lse, *_ = rawattn.torch.flash_attention_forward(q, k, v, None, None, 4, 4, 0.0, True, False)
    >>> out.shape, lse.shape
    (torch.Size([1, 4, 8, 64]), torch.Size([1, 8, 4]))
    """
    others |= {"dropout_p": dropout_p, "return_debug_mask": return_debug_mask, "seqused_k": seqused_k, "alibi_slopes": alibi_slopes}
    for name in ("dropout_p", "return_debug_mask", "seqused_k", "alibi_slopes", "block_table"):
        if isinstance(others.get(name), torch.Tensor) or others.get(name):
            raise ValueError(f"{name} is given; rawattn has nothing for it: torch.nn.attention.restore_flash_attention_impl() has")
    options: dict[str, Any] = {
        "causal": is_causal,
        "window": (-1 if window_size_left is None else window_size_left, -1 if window_size_right is None else window_size_right),
        "scale": scale,
        "out": out,
        "return_lse": True,
    }
    with torch.no_grad():  # autograd is above this op, and has its own backward for (output, LSE)
        if cum_seq_q is None:
            result, lse = rawattn.attention(query, key, value, **options)
        else:
            result, lse = rawattn.attention_varlen(query, key, value, cum_seq_q, cum_seq_k, **options)
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    return result, lse, state, torch.zeros((), dtype=torch.uint64, device=query.device), query.new_empty(0)


def scaled_dot_product_flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """aten::_scaled_dot_product_flash_attention: (B, H, S, D), in any order of strides; the output is laid out as query is.

    >>> import torch, rawattn.torch
    >>> q = k = v = torch.ones(1, 8, 4, 64, dtype=torch.float16)
    >>> rawattn.torch.scaled_dot_product_flash_attention(q, k, v, is_causal=True)[0].shape
    torch.Size([1, 8, 4, 64])
    """
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    sizes = q.shape[1], k.shape[1]
    out = torch.empty_like(query).transpose(1, 2)
    result, lse, *rest = flash_attention_forward(q, k, v, None, None, *sizes, dropout_p, is_causal, return_debug_mask, scale=scale, out=out)
    return (result.transpose(1, 2), lse, None, None, *sizes, *rest)


class _FlashImplementation:
    """The ops of aten replaced for CUDA tensors; torch.nn.attention.restore_flash_attention_impl() removes it."""

    def __init__(self) -> None:
        self.library: torch.library.Library | None = torch.library.Library("aten", "IMPL", "CUDA")
        self.library.impl("_flash_attention_forward", flash_attention_forward, "CUDA")
        self.library.impl("_scaled_dot_product_flash_attention", scaled_dot_product_flash_attention, "CUDA")

    def remove(self) -> None:
        self.library = None


if hasattr(torch.nn.attention, "register_flash_attention_impl"):  # from torch 2.11 on
    torch.nn.attention.register_flash_attention_impl("rawattn", register_fn=_FlashImplementation)


def use_in_transformers() -> None:
    """Registers "rawattn" as an attn_implementation of Hugging Face transformers: model.set_attn_implementation("rawattn").

    Prefill, cached decoding, grouped queries, sliding windows, and padding, whose masks become lengths, so that padding is skipped. Masks
    that are no lengths (holes, packed documents, a model's own) are computed by torch's SDPA. Dropout, softcap and sinks are errors.

    >>> transformers = __import__("pytest").importorskip("transformers")
    >>> import torch, rawattn.torch
    >>> rawattn.torch.use_in_transformers()
    >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 50}
    >>> config = transformers.LlamaConfig(**sizes, attn_implementation="rawattn")
    >>> model = transformers.LlamaForCausalLM(config).to(torch.float16).eval()
    >>> with torch.no_grad():
    ...     model(torch.tensor([[3, 1, 4, 1, 5]])).logits.shape
    torch.Size([1, 5, 50])
    """
    import rawattn.transformers  # noqa: F401  registers as it is imported
