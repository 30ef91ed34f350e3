"""The Triton kernels run here: compiled on a GPU, else by Triton's interpreter on CPU tensors.

The interpreter must be chosen before `import triton`, so these tests need TRITON_INTERPRET=1 in the
environment; tests/test_triton.py starts them so. Without it and without a GPU, nothing here is
collected.
"""

import math
import os
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["*"]

if INTERPRETED:
    import triton.language as tl
    import triton.runtime.interpreter as ti

    # device_assert and overflow of int32 raise
    ti.interpreter_builder.options = ti.InterpreterOptions(debug=True)
    truncating_cast = ti.InterpreterBuilder.cast_impl

    def cast_impl(self, source, destination):
        """fp32 → bf16 to nearest even, as GPUs do; the interpreter truncates."""
        if source.dtype.scalar != tl.float32 or destination.scalar != tl.bfloat16:
            return truncating_cast(self, source, destination)
        bits = np.ascontiguousarray(source.data, dtype=np.float32).view(np.uint32)
        rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
        rounded = np.where(np.isnan(source.data), ((bits >> 16) | 0x40).astype(np.uint16), rounded)
        return ti.TensorHandle(rounded.reshape(source.data.shape), destination.scalar)

    def create_fma(self, x, y, z):
        """x·y + z with one rounding, as GPUs do; the interpreter rounds twice."""
        with np.errstate(all="ignore"):
            wide = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data
            return ti.TensorHandle(wide.astype(x.data.dtype), x.dtype.scalar)

    ti.InterpreterBuilder.cast_impl = cast_impl
    ti.InterpreterBuilder.create_fma = create_fma

    # The interpreter puts its functions into triton.language again in every call of a function,
    # which is half of a test's time. Here they are put in once.
    ti._patch_lang(SimpleNamespace(__globals__={"language": tl, "core": tl.core}))
    ti._patch_lang = lambda function: ti._LangPatchScope()

    # Most of the time that is left goes into descriptions of values, which every operation makes
    # anew and none changes: numpy's dtypes, sizes of tensors and types of blocks. They are kept.
    numpy_dtype = cache(ti._get_np_dtype)
    ti._get_np_dtype = lambda dtype: numpy_dtype(tl.uint64 if is_pointer(dtype) else dtype.scalar)

    def is_pointer(dtype: tl.dtype) -> bool:
        return isinstance(dtype.scalar, tl.pointer_type)

    @cache
    def sizes(shape: tuple[int, ...]) -> tuple[tl.core.tuple, tl.constexpr]:
        return tl.core.tuple(map(tl.constexpr, shape)), tl.constexpr(math.prod(shape))

    def init_tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = sizes((*type.shape,) if type.is_block() else ())

    @cache
    def block(element: tl.dtype, shape: tuple[int, ...]) -> tl.block_type:
        return tl.block_type(element, list(shape))

    def with_element_ty(self, element):
        if is_pointer(element):  # which has no hash
            return tl.block_type(element, self.shape)
        return block(element, (*self.shape,))

    tl.tensor.__init__ = init_tensor
    tl.block_type.with_element_ty = with_element_ty
    tl.block_type.to_ir = lambda self, builder: self  # the interpreter has no other types


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/triton/" in item.path.as_posix():
            item.add_marker(
                pytest.mark.filterwarnings("ignore::RuntimeWarning")
            )  # numpy on the inf and NaN we test


@pytest.fixture(scope="session")
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture
def reverse_grid(monkeypatch):
    """Return a function; once it is called, programs run last to first."""
    if not INTERPRETED:
        pytest.skip("only the interpreter has an order of programs")
    set_grid_idx = ti.InterpreterBuilder.set_grid_idx

    def reverse():
        monkeypatch.setattr(
            ti.InterpreterBuilder,
            "set_grid_idx",
            lambda self, x, y, z: set_grid_idx(self, self.grid_dim[0] - 1 - x, y, z),
        )

    return reverse


@pytest.fixture
def no_copy_back(monkeypatch):
    """Keep the interpreter from copying every storage onto itself after a launch.

    That would touch all pages of a huge one.
    """
    if INTERPRETED:
        monkeypatch.setattr(ti.GridExecutor, "_restore_args_dev", lambda *_: None)
