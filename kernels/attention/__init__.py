"""Causal softmax attention: its cost model; the kernels are other projects'."""
