#!/usr/bin/env bash
# Fails if the sources or the given libraries use anything outside LibTorch's stable ABI.
# Usage: tools/check_abi.sh LIBRARY...
set -euo pipefail
[[ $# -gt 0 ]] || { echo "usage: $0 LIBRARY..." >&2; exit 2; }
csrc=$(dirname "$0")/../csrc
failed=0

stable='<torch/(csrc/stable|headeronly)/|<torch/csrc/inductor/aoti_torch/c/shim\.h>'
if grep -rnE '#[[:space:]]*include[[:space:]]*[<"](ATen|c10|caffe2|torch|pybind11|Python\.h)' "$csrc" | grep -vE "$stable"; then
  echo "the includes above are outside torch/csrc/stable, torch/headeronly and the C shim" >&2
  failed=1
fi

for library in "$@"; do
  symbols=$(nm --dynamic --undefined-only --demangle "$library")
  if grep -E '\b(at|c10|caffe2|torch)::|[[:space:]]_?Py[A-Z_]' <<<"$symbols"; then
    echo "the symbols of $library above are outside torch's C interface" >&2
    failed=1
  fi
done

[[ $failed = 0 ]] && echo "stable ABI only: csrc and $*"
exit $failed
