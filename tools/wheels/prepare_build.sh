#!/usr/bin/env bash
# Installs a CUDA compiler into a manylinux_2_28 container, in which the release wheels are built.
# Usage: tools/wheels/prepare_build.sh CUDA_VERSION
set -euo pipefail
[[ $# = 1 && $1 =~ ^[0-9]+\.[0-9]+$ ]] || { echo "usage: $0 CUDA_VERSION, such as 12.9" >&2; exit 2; }
command -v dnf >/dev/null || { echo "$0: no dnf; run it in a manylinux_2_28 container" >&2; exit 1; }
suffix=${1/./-}
dnf install -y dnf-plugins-core
dnf config-manager --add-repo https://developer.download.nvidia.com/compute/cuda/repos/rhel8/x86_64/cuda-rhel8.repo
dnf install -y "cuda-nvcc-$suffix" "cuda-cudart-devel-$suffix" "cuda-cccl-$suffix"
"/usr/local/cuda-$1/bin/nvcc" --version
