"""What lies between products of matrices in a transformer: rotation and the gate of the MLP."""
