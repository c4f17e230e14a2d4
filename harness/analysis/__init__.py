"""Records -> results: what a person reads is computed from these. Imports no torch."""
