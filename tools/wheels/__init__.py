"""Programs that make what is released: wheels for an old glibc and several CUDA versions, and kernels for the Hub."""
