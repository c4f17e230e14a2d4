"""The block level: a mixer with the projections, convolution, gate, norm and MLP around it."""
