"""Programs that make the release wheel from built ones: linking for an old glibc, and merging CUDA versions."""
