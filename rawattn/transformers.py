"""The attn_implementation "rawattn" of Hugging Face transformers; importing this module registers it.

A mask is None (nothing but causality or a window), or lengths: an int32 tensor (2, 1, 1, 3 B + 1), four-dimensional because transformers
hands such a mask on as it is. Its two rows are the cu_seqlens of attention_varlen() for queries and for keys: each sequence of the batch
becomes three, the padding before it, itself, and the padding after it. So padding meets only padding, and every shape is known ahead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

import rawattn.torch


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int | torch.Tensor = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask of a forward pass: None, lengths, or for what is neither the boolean mask of SDPA."""
    causal = mask_function is not bidirectional_mask_function
    if not _is_plain(mask_function, kwargs):
        kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **kwargs)

    device = kwargs["device"]
    # The keys that exist for the last query: those of a static cache go on after it.
    end = q_offset + q_length - kv_offset if causal else kv_length
    if attention_mask is None:
        if not isinstance(end, torch.Tensor) and end == kv_length:
            return None
        first = torch.zeros(batch_size, dtype=torch.int64, device=device)
        last = first + end
    else:
        position = torch.arange(kv_length, device=device)
        at = position + kv_offset
        padded = torch.nn.functional.pad(attention_mask.bool(), (0, kv_length))  # keys after the mask's end are none
        real = padded.index_select(1, at) & (position < end)
        count = real.sum(1)
        first = real.int().argmax(1)
        last = torch.where(count > 0, kv_length - real.flip(1).int().argmax(1), first)
        if not torch.compiler.is_compiling():
            # Under a causal mask padding at the end is seen by nothing but itself.
            skip, lengths = torch.stack([((first == 0) & (causal | (count == end))).all(), (count == last - first).all()]).tolist()
            if not lengths:
                kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
                return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **kwargs)
            if skip and not isinstance(end, torch.Tensor) and end == kv_length:
                return None
        if causal:
            last = torch.zeros_like(last) + end  # the diagonal ends at the last query, padding or not
    queries_first = (q_length - (last - first)).clamp(0, q_length) if causal else torch.zeros_like(first)
    return torch.stack([_pieces(queries_first, torch.full_like(first, q_length), q_length), _pieces(first, last, kv_length)])[:, None, None]


def _is_plain(mask_function: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """Whether it is causal, bidirectional, or causal within a window, and nothing more."""
    if mask_function in (causal_mask_function, bidirectional_mask_function):
        return True
    window = getattr(kwargs.get("config"), "sliding_window", None)
    # transformers forbids the skip wherever it has added anything to the mask; a chunked mask has another size.
    return bool(kwargs.get("allow_is_causal_skip")) and window is not None and kwargs.get("local_size") == window


def _pieces(first: torch.Tensor, last: torch.Tensor, length: int) -> torch.Tensor:
    """The cu_seqlens of [0, first), [first, last), [last, length) of each row of a batch whose rows are laid end to end."""
    start = torch.arange(first.shape[0], device=first.device) * length
    inner = torch.stack([start, start + first, start + last], 1).flatten()
    return torch.cat([inner, inner.new_full((1,), first.shape[0] * length)]).int()


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query (B, Hq, Sq, D), key (B, Hkv, Sk, D), value (B, Hkv, Sk, Dv) -> (B, Sq, Hq, Dv)."""
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} is given; rawattn has nothing for it: use attn_implementation='eager'")
    if dropout:
        raise ValueError(f"dropout is {dropout}; needed: 0, rawattn is for inference")
    if attention_mask is not None and attention_mask.dtype != torch.int32:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **kwargs)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    window = (sliding_window - 1, None) if sliding_window is not None and causal else None
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if attention_mask is None:
        return rawattn.torch.attention(q, k, v, causal=causal, window=window, scale=scaling), None
    packed = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
    out = rawattn.torch.attention_varlen(*packed, *attention_mask[:, 0, 0], causal=causal, window=window, scale=scaling)
    return out.reshape(*q.shape[:3], v.shape[3]), None


AttentionInterface.register("rawattn", attention)
AttentionMaskInterface.register("rawattn", mask)
