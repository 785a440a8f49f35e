"""A LLaMA-architecture decoder: its layers, its cache of keys and values, and its next token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

import rawattn

from .ops import CupyOps, NumpyOps
from .weights import Checkpoint, Config


@dataclass
class Layer:
    attention_norm: Any  # (hidden,) float32, as mlp_norm
    qkv: Any  # ((heads + 2 kv_heads) D, hidden)
    qkv_bias: Any  # None or the rows of qkv
    output: Any  # (hidden, heads D)
    mlp_norm: Any
    gate_up: Any  # (2 intermediate, hidden)
    down: Any  # (hidden, intermediate)


@dataclass
class Weights:
    embedding: Any  # (vocabulary, hidden)
    layers: list[Layer]
    norm: Any  # (hidden,) float32
    head: Any  # (vocabulary, hidden), where tied the embedding itself

    @classmethod
    def load(cls, checkpoint: Checkpoint, ops: NumpyOps | CupyOps) -> Weights:
        """Read, dequantised, rounded to the dtype of `ops`, where `ops` computes."""

        def norm(name: str, layer: int | None = None) -> Any:
            return ops.xp.asarray(checkpoint.tensor(name, layer))

        def matrix(*names: str, layer: int | None = None) -> Any:
            return ops.matrix(np.concatenate([checkpoint.tensor(name, layer) for name in names]))

        embedding = matrix("embedding")
        layers = [
            Layer(
                attention_norm=norm("attention_norm", i),
                qkv=matrix("q", "k", "v", layer=i),
                qkv_bias=matrix("q_bias", "k_bias", "v_bias", layer=i) if checkpoint.config.qkv_bias else None,
                output=matrix("output", layer=i),
                mlp_norm=norm("mlp_norm", i),
                gate_up=matrix("gate", "up", layer=i),
                down=matrix("down", layer=i),
            )
            for i in range(checkpoint.config.layers)
        ]
        return cls(embedding, layers, norm("norm"), matrix("head") if checkpoint.has("head") else embedding)

    @classmethod
    def random(cls, config: Config, matrix: Callable[[int, int], Any], ones: Callable[[int], Any]) -> Weights:
        """A model of the right size that says nothing; matrix(rows, columns) and ones(columns) make its parts."""
        rows = (config.heads + 2 * config.kv_heads) * config.head_dim
        layers = [
            Layer(
                attention_norm=ones(config.hidden),
                qkv=matrix(rows, config.hidden),
                qkv_bias=matrix(1, rows)[0] if config.qkv_bias else None,
                output=matrix(config.hidden, config.heads * config.head_dim),
                mlp_norm=ones(config.hidden),
                gate_up=matrix(2 * config.intermediate, config.hidden),
                down=matrix(config.hidden, config.intermediate),
            )
            for _ in range(config.layers)
        ]
        embedding = matrix(config.vocabulary, config.hidden)
        return cls(embedding, layers, ones(config.hidden), matrix(config.vocabulary, config.hidden))


@dataclass
class Cache:
    """Keys and values (layers, B, capacity, kv_heads, D), and lengths (B,) int32: how many of them each sequence has."""

    k: Any
    v: Any
    lengths: Any

    def row(self, b: int) -> Cache:
        """Sequence b alone, over the same memory."""
        return Cache(self.k[:, b : b + 1], self.v[:, b : b + 1], self.lengths[b : b + 1])


class Llama:
    """A model of `config` and `weights`, computed by `ops` in its dtype.

    attention: where attention(), for prompts, and attention_with_kvcache(), for next tokens, come from: rawattn by default. For prompts
        rawattn.reference does too, which takes float32.
    """

    def __init__(self, config: Config, weights: Weights, ops: NumpyOps | CupyOps, attention: Any = rawattn):
        self.config, self.weights, self.ops, self.attention = config, weights, ops, attention
        self.masks: dict[str, Any] = {"causal": True, "window": None if config.window is None else (config.window - 1, 0)}
        frequencies = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
        if config.rope_factors is not None:
            frequencies = frequencies / config.rope_factors
        angles = np.outer(np.arange(config.context), frequencies)
        self.cos, self.sin = (ops.xp.asarray(table.astype(ops.dtype)) for table in (np.cos(angles), np.sin(angles)))

    @classmethod
    def load(cls, checkpoint: Checkpoint, ops: NumpyOps | CupyOps, attention: Any = rawattn) -> Llama:
        return cls(checkpoint.config, Weights.load(checkpoint, ops), ops, attention)

    def new_cache(self, batch: int, capacity: int) -> Cache:
        if capacity > self.config.context:
            raise ValueError(f"capacity is {capacity}; needed: at most {self.config.context}, the model's context")
        shape = (self.config.layers, batch, capacity, self.config.kv_heads, self.config.head_dim)
        xp = self.ops.xp
        return Cache(xp.zeros(shape, self.ops.dtype), xp.zeros(shape, self.ops.dtype), xp.zeros(batch, np.int32))

    def prefill(self, tokens: Any, cache: Cache | None = None) -> Any:
        """The last layer's states (B S, hidden) for tokens (B, S), which begin their sequences; fills cache, if one is given."""
        batch, length = tokens.shape
        positions = self.ops.xp.arange(batch * length, dtype=np.int32) % length

        def attend(layer: int, q: Any, k: Any, v: Any) -> Any:
            q, k = self._rotate(q, positions), self._rotate(k, positions)
            q, k, v = (x.reshape(batch, length, *x.shape[1:]) for x in (q, k, v))
            if cache is not None:
                cache.k[layer, :, :length], cache.v[layer, :, :length] = k, v
            return self.attention.attention(q, k, v, **self.masks)

        if cache is not None:
            cache.lengths[...] = length
        return self._layers(tokens.reshape(-1), attend)

    def decode(self, tokens: Any, cache: Cache) -> Any:
        """Logits (B, vocabulary) float32 after tokens (B,), one for each sequence, which are appended to cache."""

        def attend(layer: int, q: Any, k: Any, v: Any) -> Any:
            return self.attention.attention_with_kvcache(
                q[:, None],
                cache.k[layer],
                cache.v[layer],
                k[:, None],
                v[:, None],
                cache_seqlens=cache.lengths,
                rotary_cos=self.cos,
                rotary_sin=self.sin,
                rotary_interleaved=self.config.rotary_interleaved,
                **self.masks,
            )

        states = self._layers(tokens, attend)
        cache.lengths += 1
        return self.logits(states)

    def logits(self, states: Any) -> Any:
        """(N, vocabulary) float32 from the states (N, hidden) of prefill()."""
        normed = self.ops.rms_norm(states, self.weights.norm, self.config.norm_eps)
        return self.ops.linear(normed, self.weights.head, dtype=np.float32)

    def _layers(self, tokens: Any, attend: Callable[[int, Any, Any, Any], Any]) -> Any:
        """States (N, hidden) float32 after tokens (N,); attend(layer, q, k, v), of (N, heads, D) not yet rotated, gives (..., heads, D)."""
        config, ops = self.config, self.ops
        x = ops.embed(self.weights.embedding, tokens)
        for i, layer in enumerate(self.weights.layers):
            qkv = ops.linear(ops.rms_norm(x, layer.attention_norm, config.norm_eps), layer.qkv, bias=layer.qkv_bias)
            qkv = qkv.reshape(len(x), config.heads + 2 * config.kv_heads, config.head_dim)
            k_at, v_at = config.heads, config.heads + config.kv_heads
            attended = attend(i, qkv[:, :k_at], qkv[:, k_at:v_at], qkv[:, v_at:])
            ops.linear(attended.reshape(len(x), -1).astype(ops.dtype, copy=False), layer.output, add_to=x)
            ops.linear(ops.swiglu(ops.linear(ops.rms_norm(x, layer.mlp_norm, config.norm_eps), layer.gate_up)), layer.down, add_to=x)
        return x

    def _rotate(self, x: Any, positions: Any) -> Any:
        return self.ops.rotate(x, positions, self.cos, self.sin, self.config.rotary_interleaved)


class Decoder:
    """Greedy steps over one cache: tokens (B,) int32 are appended to it, and become the likeliest next ones by logits (B, vocabulary).

    On a GPU a step is one CUDA graph, captured at the first, so that whatever is written into tokens, cache.lengths or the cache between
    steps counts in the next.
    """

    def __init__(self, model: Llama, cache: Cache):
        xp = model.ops.xp
        self._model, self.cache = model, cache
        self.tokens = xp.zeros(len(cache.lengths), np.int32)
        self.logits = xp.zeros((len(cache.lengths), model.config.vocabulary), np.float32)
        self._launch: Callable[[], None] = self._compute if xp is np else self._capture

    def start(self, b: int, prompt: list[int]) -> None:
        """Prefill sequence b, and take its likeliest next token."""
        model, xp = self._model, self._model.ops.xp
        states = model.prefill(xp.asarray(prompt, np.int32)[None], self.cache.row(b))
        self.logits[b] = model.logits(states[-1:])[0]
        self.tokens[b] = self.logits[b].argmax()

    def step(self) -> None:
        self._launch()

    def _compute(self) -> None:
        self.logits[...] = self._model.decode(self.tokens, self.cache)
        self.tokens[...] = self.logits.argmax(axis=1)

    def _capture(self) -> None:
        import cupy

        before, lengths = self.tokens.copy(), self.cache.lengths.copy()
        self._pool = cupy.cuda.MemoryPool()  # the graph's own, for it writes there at every launch
        stream = cupy.cuda.Stream(non_blocking=True)
        cupy.cuda.get_current_stream().synchronize()
        with stream, cupy.cuda.using_allocator(self._pool.malloc):
            self._compute()  # compiles what is new
            self.tokens[...], self.cache.lengths[...] = before, lengths
            stream.begin_capture()
            self._compute()
            graph = stream.end_capture()
            stream.synchronize()
        self._launch = graph.launch
        graph.launch()


def without_attention() -> SimpleNamespace:
    """An `attention` for Llama on a GPU that computes nothing: what a model takes less with it is what attention takes."""
    import cupy

    def nothing(q: Any, *_: Any, **__: Any) -> Any:
        return cupy.empty(q.shape, q.dtype)

    return SimpleNamespace(attention=nothing, attention_with_kvcache=nothing)
