"""`rawattn check --model`: a whole language model around rawattn, against the same model in float32 with the reference attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import rawattn
from rawattn import llama, reference
from rawattn.llama.model import Cache, Decoder, Llama, Weights
from rawattn.llama.ops import CupyOps, NumpyOps
from rawattn.llama.tokenizer import Tokenizer
from rawattn.llama.weights import open_checkpoint

NEW_TOKENS = 32  # of each answer
PERPLEXITY_LIMIT = 1e-3
BATCH_LENGTHS = (1, 17, 64, 129, 300, 511, 900)  # tokens of the text in the caches of the batch
BATCH_STEPS = 8
PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Explain in two sentences why the sky is blue.",
    "List three fruits that are red.",
    "Who wrote Romeo and Juliet?",
    "What is 12 plus 30?",
    "Give me a recipe for pancakes.",
    "Translate 'good morning' into Spanish.",
    "Write a haiku about autumn leaves.",
    "What does a lighthouse keeper do?",
    "Name the planets of the solar system, from the sun outwards.",
    "Write a Python function that adds two numbers.",
    "How do I boil an egg?",
    "What is the difference between a lake and a river?",
    "Tell me a short story about a fox.",
    "Why do we have leap years?",
    "Describe the taste of lemon.",
    "What is a prime number? Give three examples.",
    "How does a bicycle stay upright?",
    "Write a polite email that asks for a day off.",
)


@dataclass
class Claim:
    """One thing that has to hold, in words, with its figures."""

    name: str
    holds: bool
    text: str
    figures: dict[str, Any]


def check_model(path: Path, on_gpu: bool, progress: Callable[[str], None]) -> list[Claim]:
    """Run all of it on the model at `path`; progress(text) says what is under way.

    Three models compute: `ours` in float16 with rawattn, `plain` in float16 with the reference attention in float64 rounded once, and
    `exact` in float32 with the reference attention. What lies between the last two is what float16 costs, whatever computes attention.
    """
    progress("loading the model")
    checkpoint = open_checkpoint(path)
    make = CupyOps if on_gpu else NumpyOps
    half, single = make("float16"), make("float32")
    weights = Weights.load(checkpoint, half)
    ours = Llama(checkpoint.config, weights, half)
    plain = Llama(checkpoint.config, weights, half, reference)
    exact = Llama.load(checkpoint, single, reference)
    tokenizer = Tokenizer(checkpoint)
    text = tokenizer.encode((Path(llama.__file__).parent / "text.txt").read_text(encoding="utf-8"))
    return [
        *_text(ours, plain, exact, text[: checkpoint.config.context], progress),
        _prompts(ours, plain, exact, [tokenizer.chat(prompt) for prompt in PROMPTS], progress),
        _batch(ours, text, progress),
    ]


def logits_of(model: Llama, tokens: list[int]) -> Any:
    return model.logits(model.prefill(model.ops.xp.asarray(tokens, np.int32)[None]))


def _text(ours: Llama, plain: Llama, exact: Llama, text: list[int], progress: Callable[[str], None]) -> list[Claim]:
    """Logits and perplexity over the text at once."""
    perplexities: dict[str, float] = {}
    logits: dict[str, Any] = {}
    for name, model in (("exact", exact), ("plain", plain), ("ours", ours)):
        progress(f"the text of {len(text)} tokens: {name}")
        logits[name] = logits_of(model, text)
        perplexities[name] = perplexity(model.ops.xp, logits[name], text)
    error, limit = (relative_error(logits[name], logits["exact"]) for name in ("ours", "plain"))
    off = perplexities["ours"] / perplexities["exact"] - 1
    return [
        Claim(
            "logits",
            error <= limit,
            f"relative error {error:.3e}, with the reference attention {limit:.3e}: {error / limit:.4f} (limit 1)",
            {"relative_error": error, "with_the_reference_attention": limit},
        ),
        Claim(
            "perplexity",
            abs(off) <= PERPLEXITY_LIMIT,
            f"{perplexities['ours']:.4f} over {len(text)} tokens, in float32 {perplexities['exact']:.4f}: {off:+.3%} (limit 0.1%)",
            {"tokens": len(text), **perplexities},
        ),
    ]


def _prompts(ours: Llama, plain: Llama, exact: Llama, prompts: list[list[int]], progress: Callable[[str], None]) -> Claim:
    """Greedy answers, judged token by token by the exact model given the same tokens before it.

    The rule: at each position the exact model has a likeliest token and a margin to the next. Two logits cannot change places unless their
    errors together exceed the margin, so a position is clear where the margin is above twice the largest error that any logit of the
    `plain` model has there. At clear positions our token must be the exact model's; at the others it may be another, and is counted.
    """
    decoder = Decoder(ours, ours.new_cache(1, max(map(len, prompts)) + NEW_TOKENS))
    clear = clear_equal = close = close_equal = 0
    for done, prompt in enumerate(prompts):
        progress(f"prompt {done + 1} of {len(prompts)}")
        decoder.start(0, prompt)
        answer = [int(decoder.tokens[0])]
        for _ in range(NEW_TOKENS - 1):
            decoder.step()
            answer.append(int(decoder.tokens[0]))
        judged = slice(len(prompt) - 1, None)
        expected, rounded = (_to_host(logits_of(model, prompt + answer[:-1])[judged]) for model in (exact, plain))
        second, first = np.partition(expected, -2, axis=1)[:, -2:].T
        is_clear = first - second > 2 * abs(rounded - expected).max(axis=1)
        is_equal = expected.argmax(axis=1) == answer
        clear, clear_equal = clear + int(is_clear.sum()), clear_equal + int((is_clear & is_equal).sum())
        close, close_equal = close + int((~is_clear).sum()), close_equal + int((~is_clear & is_equal).sum())
    return Claim(
        "greedy tokens",
        clear_equal == clear > 0,
        f"{len(prompts)} prompts: {clear_equal} of {clear} clear tokens equal, {close_equal} of {close} within what fp16 can flip",
        {"prompts": len(prompts), "clear": clear, "clear_equal": clear_equal, "close": close, "close_equal": close_equal},
    )


class _Alone:
    """rawattn, but each decode step of a batch is also computed for each sequence alone, from the same bits; counts what differs."""

    def __init__(self) -> None:
        self.compared = self.differing = 0
        self.attention = rawattn.attention

    def attention_with_kvcache(self, q: Any, k_cache: Any, v_cache: Any, k: Any, v: Any, *, cache_seqlens: Any, **options: Any) -> Any:
        rows = [slice(b, b + 1) for b in range(len(q))]
        alone = [  # these append the same rows to the same places as the call for all
            rawattn.attention_with_kvcache(q[b], k_cache[b], v_cache[b], k[b], v[b], cache_seqlens=cache_seqlens[b], **options)
            for b in rows
        ]
        out = rawattn.attention_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens, **options)
        for b, row in zip(rows, alone, strict=True):
            self.compared += 1
            self.differing += not bool((row.view(np.uint16) == out[b].view(np.uint16)).all())
        return out


def _batch(model: Llama, text: list[int], progress: Callable[[str], None]) -> Claim:
    """The text goes on in seven caches at once, each at a place of its own; attention must have the bits of each sequence alone."""
    xp = model.ops.xp
    watched = _Alone()
    batched = Llama(model.config, model.weights, model.ops, watched)
    longest = min(max(BATCH_LENGTHS), len(text) - BATCH_STEPS, model.config.context - BATCH_STEPS)
    lengths = [min(length, longest) for length in BATCH_LENGTHS]
    cache = model.new_cache(len(lengths), longest + BATCH_STEPS)

    def decode(model: Llama, cache: Cache, lengths: list[int]) -> np.ndarray:
        """The likeliest token after each of the BATCH_STEPS tokens of the text that follow its first `length`."""
        cache.lengths[...] = xp.asarray(lengths, np.int32)
        next_tokens = []
        for step in range(BATCH_STEPS):
            tokens = xp.asarray([text[length + step] for length in lengths], np.int32)
            next_tokens.append(_to_host(model.decode(tokens, cache).argmax(axis=1)))
        return np.stack(next_tokens)

    progress("a batch of seven lengths")
    for b, length in enumerate(lengths):
        model.prefill(xp.asarray(text[:length], np.int32)[None], cache.row(b))
    together = decode(batched, cache, lengths)
    alone = np.concatenate([decode(model, cache.row(b), [length]) for b, length in enumerate(lengths)], axis=1)
    differing, tokens = watched.differing, int((together != alone).sum())
    return Claim(
        "batch of 7",
        differing == 0,
        f"{watched.compared - differing} of {watched.compared} attention outputs have the bits of their sequence alone; "
        f"{together.size - tokens} of {together.size} next tokens are equal, whose matrix products are not rawattn's",
        {"lengths": lengths, "outputs": watched.compared, "differing": differing, "tokens": together.size, "differing_tokens": tokens},
    )


def perplexity(xp: Any, logits: Any, tokens: list[int]) -> float:
    """exp of the mean of -log p(token i + 1 | tokens to i), over logits (N, vocabulary) of tokens (N,)."""
    losses = []
    for i in range(0, len(tokens) - 1, 256):  # 256 rows in float64 at a time
        rows = logits[i : min(i + 256, len(tokens) - 1)].astype(np.float64)
        top = rows.max(axis=1)
        chosen = rows[xp.arange(len(rows)), xp.asarray(tokens[i + 1 : i + 1 + len(rows)])]
        losses.append(_to_host(top + xp.log(xp.exp(rows - top[:, None]).sum(axis=1)) - chosen))
    return math.exp(np.concatenate(losses).mean())


def relative_error(logits: Any, expected: Any) -> float:
    """Relative L2 distance, a row at a time centred, for softmax sees only differences."""
    error = size = 0.0
    for i in range(0, len(logits), 256):
        exact = expected[i : i + 256].astype(np.float64)
        difference = logits[i : i + 256].astype(np.float64) - exact
        error += float(((difference - difference.mean(axis=1, keepdims=True)) ** 2).sum())
        size += float(((exact - exact.mean(axis=1, keepdims=True)) ** 2).sum())
    return math.sqrt(error / size)


def _to_host(x: Any) -> np.ndarray:
    return x if isinstance(x, np.ndarray) else x.get()
