"""Kernels (Triton for the GPU, Numba for the CPU), each with a torch-free cost model beside it."""
