"""The bridge on host memory, and its GPU side as far as no GPU is needed: CuPy arrays over addresses that nobody reads."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from rawattn import arrays

DTYPES = ("float16", "bfloat16", "float32", "int32")
FRAMEWORKS = ("numpy", "torch", "jax")


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch", reason="torch is not installed")


@pytest.fixture
def jax() -> Any:
    return pytest.importorskip("jax", reason="JAX is not installed")


def host_array(framework: str, values: np.ndarray) -> Any:
    """`values` as an array of the framework, made by that framework's own means."""
    if framework == "torch":
        torch = pytest.importorskip("torch", reason="torch is not installed")
        return torch.tensor(values.astype(np.float64)).to(getattr(torch, values.dtype.name))
    if framework == "jax":
        jax = pytest.importorskip("jax", reason="JAX is not installed")
        return jax.device_put(values, jax.devices("cpu")[0])
    return values.copy()


def sample(dtype: str) -> np.ndarray:
    return (np.arange(24).reshape(2, 3, 4) - 7).astype(dtype)


def gpu_array(framework: str, device: int, dtype: str = "float16") -> arrays.Array:
    """An Array as view() describes one on a GPU."""
    return arrays.Array(object(), framework, 0x3000, (2, 3, 4), (64, 16, 2), dtype, device)


def cupy_array(cupy: Any, dtype: str, address: int = 0x3000, device: int = 1) -> Any:
    """A CuPy array over memory that is not there: only its description is ever read."""
    memory = cupy.cuda.UnownedMemory(address, 4096, None, device)
    return cupy.ndarray((2, 3, 4), np.dtype(dtype), cupy.cuda.MemoryPointer(memory, 0), (64, 16, 2))


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_host_view_describes_the_array(framework: str, dtype: str) -> None:
    values = sample(dtype)
    x = host_array(framework, values)
    array = arrays.view("q", x)
    assert array.owner is x
    assert (array.framework, array.dtype, array.device) == (framework, dtype, None)
    assert (array.shape, array.strides) == (values.shape, values.strides)
    assert type(array.shape) is tuple and type(array.strides) is tuple
    as_numpy = arrays.to_numpy(array)
    assert as_numpy.dtype == values.dtype
    np.testing.assert_array_equal(as_numpy, values)
    assert as_numpy.ctypes.data == array.pointer, "to_numpy copied"


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_host_round_trip_returns_the_same_kind(framework: str, dtype: str) -> None:
    x = host_array(framework, sample(dtype))
    like = arrays.view("q", x)
    back = arrays.from_numpy(sample(dtype) + np.ones((), dtype), like)
    assert type(back) is type(x) and back.dtype == x.dtype
    array = arrays.view("out", back)
    assert (array.framework, array.device, array.dtype) == (framework, None, dtype)
    np.testing.assert_array_equal(arrays.to_numpy(array), sample(dtype) + np.ones((), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_shares_memory_both_ways(torch: Any, dtype: str) -> None:
    tensor = host_array("torch", sample(dtype))
    arrays.to_numpy(arrays.view("q", tensor))[0, 0, 0] = 5
    assert tensor[0, 0, 0].item() == 5
    values = sample(dtype)
    back = arrays.from_numpy(values, arrays.view("q", tensor))
    values[1, 2, 3] = 3
    assert back[1, 2, 3].item() == 3


def test_jax_result_lies_on_the_device_of_its_like(jax: Any) -> None:
    x = host_array("jax", sample("float16"))
    assert arrays.from_numpy(sample("float32"), arrays.view("q", x)).devices() == x.devices()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_torch_strides_are_in_bytes_and_slices_are_not_copied(torch: Any, dtype: str) -> None:
    packed = torch.arange(2 * 5 * 3 * 4).reshape(2, 5, 3, 4).to(getattr(torch, dtype))
    k = packed[:, 1:, 1].transpose(1, 2)
    array, size = arrays.view("k", k), packed.element_size()
    assert array.strides == (60 * size, size, 12 * size)
    assert array.pointer == packed.data_ptr() + (12 + 4) * size
    np.testing.assert_array_equal(arrays.to_numpy(array).astype(np.float64), k.double().numpy())


def test_numpy_strides_of_a_slice() -> None:
    packed = np.zeros((2, 5, 3, 4), np.float16)
    array = arrays.view("k", packed[:, ::2, 1])
    assert array.shape == (2, 3, 4) and array.strides == (120, 48, 2)
    assert array.pointer == packed.ctypes.data + 8


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("shape", [(2, 3, 4), (), (1, 1), (0, 4), (3, 0, 2)])
def test_empty_arrays_have_a_view(framework: str, shape: tuple[int, ...]) -> None:
    array = arrays.view("q", host_array(framework, np.zeros(shape, "bfloat16")))
    assert array.shape == shape and arrays.to_numpy(array).shape == shape


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 0, 4), (5,)])
def test_empty_then_hand_back(framework: str, dtype: str, shape: tuple[int, ...]) -> None:
    x = host_array(framework, sample("float16"))
    like = arrays.view("q", x)
    array = arrays.empty(like, shape, dtype)
    assert (array.shape, array.dtype, array.device) == (shape, dtype, None)
    if 0 not in shape:
        assert array.strides == np.empty(shape, dtype).strides
    arrays.to_numpy(array)[...] = 3
    result = arrays.hand_back(array, like, inputs=[like])
    assert type(result) is type(x)
    assert arrays.view("out", result).dtype == dtype
    np.testing.assert_array_equal(arrays.to_numpy(arrays.view("out", result)), np.full(shape, 3, dtype))


def test_a_parameter_is_viewed_where_grad_is_off(torch: Any) -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"^k requires grad; rawattn computes no gradients: pass k\.detach\(\) or use torch\.no_grad\(\)$"):
        arrays.view("k", parameter)
    with torch.no_grad():
        array = arrays.view("k", parameter)
        assert array.pointer == parameter.data_ptr()
        assert arrays.to_numpy(array).tolist() == [[1, 1, 1], [1, 1, 1]]
    with torch.inference_mode():
        arrays.view("k", parameter)
    arrays.view("k", parameter.detach())


def test_torch_tensor_off_gpu_and_cpu_is_an_error(torch: Any) -> None:
    with pytest.raises(ValueError, match="^v is a torch tensor on meta; needed: one on a CUDA GPU or the CPU$"):
        arrays.view("v", torch.ones(2, 3, device="meta"))


@pytest.mark.filterwarnings("ignore")  # torch calls these layouts prototypes
@pytest.mark.parametrize("kind", ["sparse_coo", "sparse_csr", "mkldnn", "nested", "jagged", "fake"])
def test_torch_tensor_that_is_no_block_of_memory_is_an_error(torch: Any, kind: str) -> None:
    dense = torch.eye(3)
    if kind == "fake":
        from torch._subclasses.fake_tensor import FakeTensorMode

        x = FakeTensorMode().from_tensor(dense)
    elif kind in ("nested", "jagged"):
        x = torch.nested.nested_tensor([dense, dense[:2]], layout=torch.jagged if kind == "jagged" else torch.strided)
    else:
        x = {"sparse_coo": dense.to_sparse, "sparse_csr": dense.to_sparse_csr, "mkldnn": dense.to_mkldnn}[kind]()
    with pytest.raises(TypeError, match=r"^q is a torch \w+ \(torch\.\w+\) that is no block of memory; needed: a plain dense tensor$"):
        arrays.view("q", x)


def test_torch_tensor_inside_vmap_is_an_error(torch: Any) -> None:
    with pytest.raises(TypeError, match="^q is a torch Tensor .* no block of memory"):
        torch.vmap(lambda x: arrays.view("q", x))(torch.ones(2, 3))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "bool", "int16", "uint8"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_dtype_is_readable_where_we_do_not_compute_in_it(framework: str, dtype: str) -> None:
    x = host_array(framework, np.zeros(2, getattr(ml_dtypes, dtype, dtype)))
    assert arrays.view("q", x).dtype == dtype


@pytest.mark.parametrize(
    "x", [[1.0, 2.0], (1,), None, 1.5, "q", np.float16(1), np.ndarray], ids=lambda x: getattr(x, "__name__", type(x).__name__)
)
def test_what_is_no_array_is_a_type_error(x: Any) -> None:
    wanted = f"^k is a {type(x).__name__}; needed: a NumPy, CuPy, torch or JAX array, or another CUDA array with __dlpack__$"
    for _ in range(2):  # the second time from the cache
        with pytest.raises(TypeError, match=wanted):
            arrays.view("k", x)


def test_other_host_array_with_dlpack_is_a_type_error() -> None:
    class Foreign:
        dtype = "float16"

        def __dlpack__(self, **_: Any) -> Any:
            raise AssertionError("not asked for: it is on the host")

        def __dlpack_device__(self) -> tuple[int, int]:
            return 1, 0

    with pytest.raises(TypeError, match="^q is a Foreign of float16 that CuPy cannot read: it is not on a CUDA GPU$"):
        arrays.view("q", Foreign())


@pytest.mark.parametrize("transform", ["jit", "vmap", "grad"])
def test_jax_tracer_is_a_type_error(jax: Any, transform: str) -> None:
    def traced(x: Any) -> Any:
        arrays.view("q", x)
        return x.sum()

    with pytest.raises(TypeError, match=r"^q is a JAX tracer; attention\(\) works on concrete arrays"):
        getattr(jax, transform)(traced)(jax.numpy.ones(3))


def test_sharded_jax_array_is_an_error(jax: Any) -> None:
    code = """
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
from rawattn import arrays
mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")), ("batch",))
x = jax.device_put(np.zeros((4, 2), np.float16), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch")))
try:
    arrays.view("q", x)
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "q is a jax.Array over 2 devices; needed: one on a single device\n", done.stderr


def test_check_together_names_the_two_arguments() -> None:
    on_host, torch_0, torch_1 = arrays.view("q", np.zeros(2)), gpu_array("torch", 0), gpu_array("torch", 1)
    arrays.check_together({"q": torch_0, "k": torch_0, "v": torch_0})
    arrays.check_together({"q": on_host})
    needed = "; needed: one framework and one device for all$"
    for others, message in [
        ({"k": torch_0, "v": torch_1}, "^v is a torch array on GPU 1 but q is a torch array on GPU 0"),
        ({"k": on_host}, "^k is a numpy array in host memory but q is a torch array on GPU 0"),
        ({"k": gpu_array("cupy", 0)}, "^k is a cupy array on GPU 0 but q is a torch array on GPU 0"),
    ]:
        with pytest.raises(ValueError, match=message + needed):
            arrays.check_together({"q": torch_0, **others})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_cupy_view_and_back(dtype: str) -> None:
    x = cupy_array(pytest.importorskip("cupy"), dtype)
    array = arrays.view("q", x)
    assert array == arrays.Array(x, "cupy", 0x3000, (2, 3, 4), (64, 16, 2), dtype, 1)
    assert arrays.as_cupy(array) is x and arrays.hand_back(array, array) is x


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_as_cupy_of_torch_memory(dtype: str) -> None:
    pytest.importorskip("cupy")
    array = gpu_array("torch", 1, dtype)
    x = arrays.as_cupy(array)
    assert (x.data.ptr, x.shape, x.strides, x.dtype) == (0x3000, (2, 3, 4), (64, 16, 2), np.dtype(dtype))
    assert x.data.device_id == 1 and x.data.mem.size == 64 + 32 + 6 + 2
    assert arrays.hand_back(array, array) is array.owner


def test_current_stream_is_torchs_and_is_wrapped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cupy")
    current = {0: 0x7000, 1: 0}
    monkeypatch.setattr(arrays, "torch_stream_pointer", lambda: current.__getitem__)
    stream = arrays.current_stream(gpu_array("torch", 0))
    assert stream.ptr == 0x7000 and stream is arrays.current_stream(gpu_array("torch", 0))
    assert arrays.current_stream(gpu_array("torch", 1)).ptr == 0
    current[0] = 0x8000
    assert arrays.current_stream(gpu_array("torch", 0)).ptr == 0x8000


def test_numpy_use_imports_no_gpu_framework() -> None:
    code = """
import sys
import numpy as np
import rawattn.arrays as arrays
x = arrays.view("q", np.zeros((2, 3), np.float16))
arrays.check_together({"q": x, "k": x})
arrays.hand_back(arrays.empty(x, (2,), "bfloat16"), x)
arrays.from_numpy(arrays.to_numpy(x), x)
print(sorted({"torch", "jax", "cupy"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr
