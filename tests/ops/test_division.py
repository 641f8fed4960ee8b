"""The division of csrc/common/division.h against Python's integers."""

import ctypes
import random
import subprocess

import pytest
from test_elementary import COMPILER, CSRC, INCLUDE

SOURCE = """
#include "common/division.h"
extern "C" unsigned quotient(unsigned n, long d) { return retinanet::Divisor(d).quotient(n); }
"""

pytestmark = [
    pytest.mark.backends("cpu"),
    pytest.mark.skipif(not CSRC.exists(), reason="needs the source tree"),
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler"),
]


def test_quotient(tmp_path):
    (tmp_path / "division.cpp").write_text(SOURCE)
    flags = ["-std=c++20", "-O2", "-fPIC", "-shared"]
    includes = [f"-I{folder}" for folder in (CSRC, INCLUDE, INCLUDE / "torch/csrc/api/include")]
    library = tmp_path / "division.so"
    subprocess.run([COMPILER, *flags, *includes, tmp_path / "division.cpp", "-o", library], check=True)
    quotient = ctypes.CDLL(str(library)).quotient
    quotient.restype, quotient.argtypes = ctypes.c_uint, (ctypes.c_uint, ctypes.c_long)
    generator = random.Random(0)
    powers = [2**k + i for k in range(1, 32) for i in (-1, 0, 1)]
    divisors = {d for d in (*range(1, 300), *powers) if 0 < d < 2**31}
    divisors |= {int(2 ** generator.uniform(0, 31)) for _ in range(3000)}
    for d in sorted(divisors):
        multiples = [
            k * d + i for k in (1, 2, 3, (2**31 - 1) // d, generator.randrange(2**31 // d + 1)) for i in (-1, 0)
        ]
        for n in (0, 1, 2**31 - 1, generator.randrange(2**31), *multiples):
            if 0 <= n < 2**31:
                assert quotient(n, d) == n // d, (n, d)
