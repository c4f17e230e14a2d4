"""One token of s6 and ssd, the state updated in place: Triton on a GPU, Numba or torch on a CPU."""
