"""The attention geometries that commands know by the name of a model."""

from __future__ import annotations

from typing import NamedTuple


class Geometry(NamedTuple):
    heads: int
    kv_heads: int
    head_dim: int


GEOMETRIES = {
    "llama-3.1-8b": Geometry(32, 8, 128),
    "mistral-7b": Geometry(32, 8, 128),
    "qwen-2.5-7b": Geometry(28, 4, 128),
    "mistral-large-2": Geometry(96, 8, 128),
}
