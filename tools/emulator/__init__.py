"""An emulator of CUDA on the CPU, and the CUDA kernels built for it."""
