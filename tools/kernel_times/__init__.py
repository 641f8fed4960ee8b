"""Predicts how long the kernels take on a GPU, from the work and span that the emulator counts."""
