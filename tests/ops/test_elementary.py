"""The polynomials of csrc/common/elementary.h against float64, with and without fused multiply-add."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

CSRC = Path(__file__).resolve().parents[2] / "csrc"
INCLUDE = Path(torch.__file__).parent / "include"
COMPILER = shutil.which("g++") or shutil.which("c++")
SOURCE = """
#include "common/elementary.h"
using namespace retinanet;
#define EXPORT(name, function, fma)                                              \\
  extern "C" void name(const float* x, long n, float* out) {                     \\
    for (long i = 0; i < n; ++i) out[i] = function<Arithmetic<fma>>(x[i]);       \\
  }
#define EXPORT_BY_TERMS(name, function)                                          \\
  extern "C" void name(const float* x, long n, float* out) {                     \\
    for (long i = 0; i < n; ++i) out[i] = function(x[i]);                        \\
  }
EXPORT_BY_TERMS(exp_minus_by_terms_of, exp_minus_by_terms)
EXPORT_BY_TERMS(log1p_ratio_by_terms_of, log1p_ratio_by_terms<1>)
EXPORT_BY_TERMS(twice_log1p_ratio_by_terms_of, log1p_ratio_by_terms<2>)
EXPORT_BY_TERMS(twice_reciprocal_by_terms_of, twice_reciprocal_by_terms)
EXPORT(exp_minus_fma, exp_minus, true)
EXPORT(exp_minus_plain, exp_minus, false)
EXPORT(log1p_unit_fma, log1p_unit, true)
EXPORT(log1p_unit_plain, log1p_unit, false)
"""

pytestmark = [
    pytest.mark.backends("cpu"),
    pytest.mark.skipif(not CSRC.exists(), reason="needs the source tree"),
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("elementary")
    (folder / "elementary.cpp").write_text(SOURCE)
    # -ffp-contract=off, because the variant without fused multiply-add must round every product.
    flags = ["-std=c++20", "-O2", "-fPIC", "-shared", "-ffp-contract=off", "-Wno-attributes"]
    includes = [f"-I{CSRC}", f"-I{INCLUDE}", f"-I{INCLUDE}/torch/csrc/api/include"]
    command = [COMPILER, *flags, *includes, str(folder / "elementary.cpp"), "-o", str(folder / "elementary.so")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "elementary.so"))


def evaluate(library: ctypes.CDLL, name: str, x: np.ndarray) -> np.ndarray:
    out = np.empty_like(x)
    pointer = ctypes.POINTER(ctypes.c_float)
    getattr(library, name)(x.ctypes.data_as(pointer), ctypes.c_long(x.size), out.ctypes.data_as(pointer))
    return out


def bit_patterns(low: float, high: float, count: int) -> np.ndarray:
    """Return floats from low to high: `count` with evenly spaced bit patterns and `count` with evenly spaced values."""
    first, last = np.float32([low, high]).view(np.int32)
    patterns = np.linspace(first, last, count).astype(np.int32).view(np.float32)
    return np.concatenate([patterns, np.linspace(low, high, count, dtype=np.float32)])


@pytest.mark.parametrize("arithmetic", ("fma", "plain"))
def test_exp_minus(library, arithmetic):
    a = bit_patterns(0.0, 87.0, 1 << 21)  # beyond 87, the result is subnormal
    expected = np.exp(-a.astype(np.float64))
    error = np.abs(evaluate(library, f"exp_minus_{arithmetic}", a) / expected - 1)
    assert error.max() <= 8.5e-8, a[error.argmax()]


@pytest.mark.parametrize("arithmetic", ("fma", "plain"))
def test_exp_minus_of_subnormal_results(library, arithmetic):
    a = bit_patterns(87.0, 130.0, 1 << 20)
    error = np.abs(evaluate(library, f"exp_minus_{arithmetic}", a) - np.exp(-a.astype(np.float64)))
    assert error.max() <= 0.5 * 2.0**-149 + 1e-7 * np.exp(-87.0)


@pytest.mark.parametrize("arithmetic", ("fma", "plain"))
def test_exp_minus_of_limits(library, arithmetic):
    quiet, payload = np.array([0x7FC00000, 0x7FC001FF], dtype=np.uint32).view(np.float32)
    out = evaluate(library, f"exp_minus_{arithmetic}", np.array([0, np.inf, quiet, payload, -quiet], dtype=np.float32))
    assert out[0] == 1
    assert out[1] == 0
    assert np.isnan(out[2:]).all()


@pytest.mark.parametrize(("arithmetic", "bound"), [("fma", 1.4e-7), ("plain", 1.8e-7)])
def test_log1p_unit(library, arithmetic, bound):
    e = bit_patterns(2.0**-126, 1.0, 1 << 21)
    error = np.abs(evaluate(library, f"log1p_unit_{arithmetic}", e) / np.log1p(e.astype(np.float64)) - 1)
    assert error.max() <= bound, e[error.argmax()]


@pytest.mark.parametrize("arithmetic", ("fma", "plain"))
def test_log1p_unit_of_limits(library, arithmetic):
    tiny = np.float32(2.0**-149)
    out = evaluate(library, f"log1p_unit_{arithmetic}", np.array([0, tiny, np.nan], dtype=np.float32))
    assert out[0] == 0
    assert out[1] == tiny
    assert np.isnan(out[2])


def test_exp_minus_by_terms(library):
    a = bit_patterns(0.0, 87.0, 1 << 21)
    error = np.abs(evaluate(library, "exp_minus_by_terms_of", a) / np.exp(-a.astype(np.float64)) - 1)
    assert error.max() <= 7.6e-8, a[error.argmax()]


def test_log1p_ratio_by_terms(library):
    e = bit_patterns(2.0**-126, 1.0, 1 << 21)
    ratio = evaluate(library, "log1p_ratio_by_terms_of", e)
    error = np.abs(ratio / (np.log1p(e.astype(np.float64)) / e) - 1)
    assert error.max() <= 1.2e-7, e[error.argmax()]
    assert (evaluate(library, "twice_log1p_ratio_by_terms_of", e) == 2 * ratio).all()


def test_twice_reciprocal_by_terms(library):
    e = bit_patterns(2.0**-126, 1.0, 1 << 21)
    r = evaluate(library, "twice_reciprocal_by_terms_of", e)
    error = np.abs(r * (1 + e.astype(np.float64)) / 2 - 1)
    assert error.max() <= 2.6e-6, e[error.argmax()]
    assert (r[np.float32(1) + e == 1] == 2).all()
