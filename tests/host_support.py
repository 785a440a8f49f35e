"""Arrays of any framework in host memory, for the tests that need no GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


def given_as(framework: str, x: np.ndarray) -> Any:
    """The same numbers as an array of `framework` in host memory."""
    if framework == "torch":
        torch = pytest.importorskip("torch", reason="torch is not installed")
        return torch.from_numpy(x.astype(np.float64)).to(getattr(torch, x.dtype.name))
    if framework == "jax":
        jax = pytest.importorskip("jax", reason="JAX is not installed")
        return jax.device_put(x, jax.devices("cpu")[0])
    return x


def read(x: Any) -> np.ndarray:
    """The numbers of any framework's array, exactly."""
    return x.double().numpy() if hasattr(x, "double") else np.asarray(x).astype(np.float64)
