#!/usr/bin/env bash
# Runs tests/ops and the packaging tests with a wheel, beside each of the given versions of torch. Run by check_wheel.sh
# and by the workflows. The environments are kept in build/test-wheel, unless REMOVE_ENVIRONMENTS=1 removes each of them
# after its tests.
# Usage: [PYTHON=python3] tools/test_wheel.sh WHEEL TORCH_VERSION[:ATEN_CPU_CAPABILITY]...
# The version "newest" is the newest one that pip finds, for example a nightly one with PIP_PRE and PIP_INDEX_URL.
set -euo pipefail
[[ $# -ge 2 ]] || { echo "usage: $0 WHEEL TORCH_VERSION[:ATEN_CPU_CAPABILITY]..." >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
wheel=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
shift
work=$root/build/test-wheel
python=${PYTHON:-python3}
# The ABI flags tell a free-threaded Python ("t") from the usual one.
tag=$("$python" -c 'import sys; print("python%d.%d%s" % (*sys.version_info[:2], sys.abiflags))')
export PIP_DISABLE_PIP_VERSION_CHECK=1

# The tests run in a copy, without the source tree, so that they import the installed package. Tests that need
# torchvision, the model or the tools skip themselves. The largest inputs are left to `make test`.
rm -rf "$work/run"
mkdir -p "$work/run/tests/tools"
cp -r "$root/tests/conftest.py" "$root/tests/ops" "$work/run/tests"
cp "$root/tests/tools/test_packaging.py" "$work/run/tests/tools"
cp "$root/pyproject.toml" "$work/run"
cd "$work/run"
for choice; do
  IFS=: read -r version capability <<<"$choice"
  echo "--- $tag, torch $choice"
  venv=$work/$tag-torch-$version
  # A kept environment may hold an older torch than the newest one.
  if [[ $version = newest || ! -e $venv/.installed ]]; then
    [[ $version = newest ]] && torch=torch || torch="torch==$version"
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --upgrade "$torch" pytest hypothesis
    touch "$venv/.installed"
  fi
  # The first command installs what the wheel depends on, the second one the wheel, even if this version is there.
  "$venv/bin/python" -m pip install --quiet "$wheel"
  "$venv/bin/python" -m pip install --quiet --no-deps --force-reinstall "$wheel"
  env ${capability:+"ATEN_CPU_CAPABILITY=$capability"} "$venv/bin/python" -m pytest --quiet tests -k "not TestLarge"
  [[ ${REMOVE_ENVIRONMENTS:-0} = 0 ]] || rm -rf "$venv"
done
