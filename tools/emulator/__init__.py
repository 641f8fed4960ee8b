"""An emulator of CUDA on the CPU, and the programs that build the kernels for it and test them."""
