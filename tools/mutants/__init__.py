"""Mutation testing of the kernels."""
