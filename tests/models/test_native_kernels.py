"""Products of a few rows: what our own code gives against numpy's, and that MLX really runs it."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from osaurus_grpc.models import native_kernels, platform
from osaurus_grpc.models.native_kernels import NativeKernels
from osaurus_grpc.models.platform import mx

LIBRARY = Path(native_kernels.__file__).parent / "native" / "libosaurus_native.so"
SHALLOW = 1024
MAX_ROWS_SHALLOW = 512
MAX_ROWS = 64

needs_library = pytest.mark.skipif(
    platform.blas.kernels is None, reason="not compiled: no C compiler, another processor, or not installed"
)


def products() -> int:
    assert platform.blas.kernels is not None
    return platform.blas.kernels.products


def random(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


@needs_library
@pytest.mark.parametrize("rows", [*range(1, 14), 23, 24, 25, 64])
def test_products_are_numpys(rows):
    rng = np.random.default_rng(rows)
    # Depths and widths around the sizes of vectors, tiles and strips.
    for columns in (1, 2, 3, 7, 8, 9, 47, 48, 49, 96, 97, 145):
        for depth in (1, 7, 8, 9, 64, 71, 576):
            x, weight = random(rng, rows, depth), random(rng, columns, depth)
            before = products()
            mine = np.array(mx.array(x) @ mx.array(weight).T)
            # A single column or row may be laid out so that either order of it is right.
            assert products() > before or 1 in (rows, columns, depth)
            np.testing.assert_allclose(mine, x.astype(np.float64) @ weight.T, rtol=1e-4, atol=1e-4)


@needs_library
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 13, MAX_ROWS])
def test_a_row_is_the_same_whatever_others_there_are(rows):
    rng = np.random.default_rng(rows)
    for depth, columns in ((576, 1536), (1536, 577), (77, 50), (4097, 100), (8192, 49)):
        x, weight = random(rng, rows, depth), mx.array(random(rng, columns, depth))
        together = np.array(mx.array(x) @ weight.T)
        alone = [np.array(mx.array(x[i : i + 1]) @ weight.T)[0] for i in range(rows)]
        assert np.array_equal(together, np.stack(alone))


@needs_library
@pytest.mark.parametrize(
    ("rows", "depth", "columns"),
    [
        (MAX_ROWS_SHALLOW, 77, 200),
        (MAX_ROWS_SHALLOW - 1, SHALLOW, 193),
        (MAX_ROWS, SHALLOW + 1, 97),
        # In parts, the last of which is shorter.
        (5, 4097, 50),
        (33, 4864, 97),
        (3, 8192, 17),
        (1, 10_001, 9),
    ],
)
def test_products_of_many_rows_and_of_deep_matrices(rows, depth, columns):
    rng = np.random.default_rng(rows)
    x, weight = random(rng, rows, depth), random(rng, columns, depth)
    before = products()
    mine = np.array(mx.array(x) @ mx.array(weight).T)
    assert products() == before + 1
    np.testing.assert_allclose(mine, x.astype(np.float64) @ weight.T, rtol=1e-4, atol=1e-3)
    alone = np.array(mx.array(x[-1:]) @ mx.array(weight).T)
    assert np.array_equal(mine[-1:], alone)


@needs_library
def test_rows_with_room_between_them():
    """MLX copies such arrays first; the interface has them all the same."""
    rng = np.random.default_rng(0)
    x, weights, result = random(rng, 6, 100), random(rng, 40, 200), np.zeros((6, 50), np.float32)
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (x, weights[:, 100:], result)]
    product = ctypes.CDLL(str(LIBRARY)).cblas_sgemm
    one, zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
    before = products()
    product(101, 111, 112, 6, 40, 71, one, pointers[0], 100, pointers[1], 200, zero, pointers[2], 50)
    assert products() == before + 1
    np.testing.assert_allclose(result[:, :40], x[:, :71] @ weights[:, 100:171].T, rtol=1e-4, atol=1e-4)
    assert not result[:, 40:].any()


@needs_library
@pytest.mark.parametrize(
    ("left_rows", "depth", "transposed_left", "transposed_right"),
    [
        (MAX_ROWS + 1, SHALLOW + 1, False, True),
        (MAX_ROWS_SHALLOW + 1, 64, False, True),
        (8, 64, False, False),
        (8, 64, True, True),
        (8, 64, True, False),
    ],
)
def test_other_products_are_the_blas(left_rows, depth, transposed_left, transposed_right):
    rng = np.random.default_rng(left_rows)
    x = random(rng, depth, left_rows).T if transposed_left else random(rng, left_rows, depth)
    weight = random(rng, 32, depth).T if transposed_right else random(rng, depth, 32)
    left = mx.array(x.T).T if transposed_left else mx.array(x)
    right = mx.array(weight.T).T if transposed_right else mx.array(weight)
    mx.eval(left, right)
    before = products()
    mine = np.array(left @ right)
    assert products() == before
    np.testing.assert_allclose(mine, x @ weight, rtol=1e-4, atol=1e-4)


@needs_library
def test_a_product_of_no_depth_is_zero():
    left, result = np.ones((2, 4), np.float32), np.ones((2, 3), np.float32)
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (left, left, result)]
    one, zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
    ctypes.CDLL(str(LIBRARY)).cblas_sgemm(
        101, 111, 112, 2, 3, 0, one, pointers[0], 4, pointers[1], 4, zero, pointers[2], 3
    )
    assert not result.any()


@pytest.fixture
def kernels() -> Iterator[NativeKernels]:
    found = platform.blas.kernels
    assert found is not None
    before = found.threads
    yield found
    found.threads = before


@needs_library
class TestThreads:
    """How many work on something changes nothing of what comes out."""

    def results(self, kernels: NativeKernels) -> list[np.ndarray]:
        rng = np.random.default_rng(3)
        weight = random(rng, 1000, 576)
        products = [np.array(mx.array(random(rng, rows, 576)) @ mx.array(weight).T) for rows in (1, 3, 8, 65)]
        q, k, v = random(rng, 4, 6, 40, 64), random(rng, 4, 2, 300, 64), random(rng, 4, 2, 300, 64)
        for queries in (1, 3, 40):
            rows = np.ascontiguousarray(q[:, :, :queries])
            attended = kernels.attention(rows, k, v, scale=0.125, is_causal=True)
            assert attended is not None
            products.append(attended)
        return products

    def test_results_are_the_same(self, kernels):
        kernels.threads = 1
        alone = self.results(kernels)
        for threads in (2, 5, 3, 1):
            kernels.threads = threads
            assert kernels.threads == threads
            for mine, expected in zip(self.results(kernels), alone, strict=True):
                assert np.array_equal(mine, expected)

    def test_callers_beside_each_other(self, kernels):
        kernels.threads = 1
        alone = self.results(kernels)
        kernels.threads = 3
        with ThreadPoolExecutor(4) as pool:
            together = [pool.submit(self.results, kernels) for _ in range(24)]
        for future in together:
            for mine, expected in zip(future.result(timeout=60), alone, strict=True):
                assert np.array_equal(mine, expected)

    def test_wrong_numbers(self, kernels):
        for asked, given in ((0, 1), (-3, 1), (1000, 64)):
            kernels.threads = asked
            assert kernels.threads == given

    def test_the_settings_reach_them(self, kernels):
        before = platform.blas.threads
        try:
            platform.set_blas_threads(2)
            assert kernels.threads == 2
        finally:
            platform.set_blas_threads(before)


@needs_library
def test_it_adds_as_the_blas_does():
    rng = np.random.default_rng(0)
    x, weight, bias = random(rng, 8, 64), random(rng, 32, 64), random(rng, 8, 32)
    mine = mx.addmm(mx.array(bias), mx.array(x), mx.array(weight).T, alpha=0.5, beta=2.0)
    np.testing.assert_allclose(np.array(mine), 0.5 * (x @ weight.T) + 2.0 * bias, rtol=1e-4, atol=1e-4)


@needs_library
def test_infinities_and_what_is_no_number_stay():
    x, weight = np.ones((2, 16), np.float32), np.ones((9, 16), np.float32)
    x[0, 3], x[1, 15], weight[4, 0] = np.inf, np.nan, -np.inf
    with np.errstate(invalid="ignore"):
        wanted = x @ weight.T
        np.testing.assert_array_equal(np.array(mx.array(x) @ mx.array(weight).T), wanted)


def product_elsewhere(**environment: str) -> str:
    """What another process computes, and how many products were ours."""
    code = (
        "from osaurus_grpc.models.platform import blas, mx\n"
        "y = mx.arange(64.0).reshape(2, 32) @ mx.arange(128.0).reshape(4, 32).T\n"
        "print(float(y[0, 0]), blas.kernels and blas.kernels.products)"
    )
    root = Path(__file__).parents[2]
    finished = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True, timeout=120, cwd=root,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(root), **environment},
    )  # fmt: skip
    return finished.stdout.strip()


@needs_library
def test_it_can_be_turned_off():
    assert product_elsewhere() == "10416.0 1"
    assert product_elsewhere(OSAURUS_NATIVE_KERNELS="0") == "10416.0 None"


class TestLoading:
    """What is no library of ours leaves everything to the BLAS."""

    blas = ctypes.CDLL(None)

    def test_none_is_there(self, tmp_path):
        assert native_kernels.load(self.blas, library=tmp_path / "none.so") is None

    def test_a_damaged_file(self, tmp_path):
        damaged = tmp_path / "damaged.so"
        damaged.write_bytes(b"\x7fELF and no more")
        assert native_kernels.load(self.blas, library=damaged) is None

    @pytest.mark.parametrize("text", ["", "flags : fpu sse2 avx2\n", "Features : asimd fp\n"])
    def test_a_processor_without_the_instructions(self, tmp_path, text):
        cpu_info = tmp_path / "cpuinfo"
        cpu_info.write_text(text)
        library = tmp_path / "library.so"
        library.write_bytes(b"never opened")
        assert native_kernels.load(self.blas, library=library, cpu_info=cpu_info) is None
        assert native_kernels.load(self.blas, library=library, cpu_info=tmp_path / "none") is None

    @needs_library
    def test_one_of_another_version(self, monkeypatch):
        monkeypatch.setattr(native_kernels, "_INTERFACE", 10**6)
        assert native_kernels.load(self.blas, library=LIBRARY) is None
