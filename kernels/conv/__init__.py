"""Causal depthwise convolution with SiLU: the short filter of both Mamba blocks."""
