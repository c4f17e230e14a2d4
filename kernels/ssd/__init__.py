"""State-space duality (Mamba-2)."""
