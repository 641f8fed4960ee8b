"""The resources of the compiled CUDA kernels: docs/generated/kernels.json, kernels.md and their check."""
