"""The selective scan (Mamba-1)."""
