"""RMS normalisation, with or without a SiLU gate before it."""
