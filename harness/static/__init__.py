"""Kernels judged without a GPU, by what their binaries take."""
