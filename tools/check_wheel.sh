#!/usr/bin/env bash
# Builds the sdist and a manylinux_2_28 wheel of the same sources. Tests that wheel (test_wheel.sh) beside older versions
# of torch, each with an older instruction set of the CPU, because `make test` covers the newest of both.
# Run by `make check-wheel`, which puts .venv/bin on PATH.
# Usage: tools/check_wheel.sh [TORCH_VERSION[:ATEN_CPU_CAPABILITY]...]
set -euo pipefail
[[ $# -gt 0 ]] || set -- 2.13.0:avx2 2.10.0:default
root=$(cd "$(dirname "$0")/.." && pwd)
work=$root/build/check-wheel
export PIP_DISABLE_PIP_VERSION_CHECK=1

# dist gets the two files of a release. The wheel that manylinux.py links again is in plain.
rm -rf "$work/dist" "$work/plain" "$work/run"
mkdir -p "$work/dist" "$work/plain" "$work/run"

echo "--- sdist and wheel"
python -m build --no-isolation --sdist --outdir "$work/dist" "$root" >"$work/sdist.log" 2>&1 || { tail -50 "$work/sdist.log"; exit 1; }
sdist=$(ls "$work"/dist/*.tar.gz)
# The wheel is built from the tree, whose object files it reuses if TORCH_CUDA_ARCH_LIST is that of the last build. A
# wheel from the sdist would be the same, because what it is built from is.
tar -xzf "$sdist" -C "$work/run" --one-top-level=sdist --strip-components=1
for path in setup.py pyproject.toml MANIFEST.in README.md LICENSE csrc retinanet retinanet_ops; do
  diff -r --exclude=__pycache__ --exclude="*.so" --exclude=_build_info.json "$root/$path" "$work/run/sdist/$path"
done
python -m pip wheel --no-cache-dir --no-build-isolation --no-deps --wheel-dir "$work/plain" "$root" >"$work/wheel.log" 2>&1 ||
  { tail -50 "$work/wheel.log"; exit 1; }

echo "--- manylinux_2_28"
(cd "$root" && python -m tools.wheels.manylinux --output-dir "$work/dist" "$(ls "$work"/plain/*-py3-none-linux_*.whl)")
wheel=$(ls "$work"/dist/*-py3-none-manylinux_2_28_*.whl)
auditwheel show "$wheel"
python -m zipfile --extract "$wheel" "$work/run/libraries"
"$root/tools/check_abi.sh" "$work"/run/libraries/retinanet_ops/*.so
python - "$sdist" "$wheel" <<'PYTHON'
import re, sys, tarfile, zipfile

sdist = {name.split("/", 1)[-1] for name in tarfile.open(sys.argv[1]).getnames()}
wheel = set(zipfile.ZipFile(sys.argv[2]).namelist())
for source in ("setup.py", "LICENSE", "csrc/library.cpp", "csrc/common/tensor.h", "csrc/common/cuda.h", "csrc/focal_loss_cuda.cu"):
    assert source in sdist, f"{source} is missing from the sdist"
for file in ("retinanet_ops/_C.so", "retinanet_ops/_build_info.json", "retinanet_ops/py.typed", "retinanet/py.typed"):
    assert file in wheel, f"{file} is missing from the wheel"
cuda = [file for file in wheel if re.fullmatch(r"retinanet_ops/_cuda\d+\.so", file)]
assert len(cuda) == 1, f"expected one CUDA library in the wheel, found {sorted(cuda)}"
assert not any(name.endswith((".so", "_build_info.json")) for name in sdist), "the sdist holds build results"
packages = {name.split("/")[0].split("-")[0] for name in wheel}
assert packages == {"retinanet", "retinanet_ops"}, f"the wheel installs {sorted(packages)}"
print(f"contents are complete: {len(sdist)} files in the sdist, {len(wheel)} in the wheel")
PYTHON

"$root/tools/test_wheel.sh" "$wheel" "$@"
