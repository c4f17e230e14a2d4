"""Mambench: measure Mamba against attention, at your sequence length, on your GPU.

In a checkout this package is a shim: its sub-packages (`mambench.harness`, `mambench.kernels`, ...)
are the folders beside it. An installed wheel carries them inside and needs no shim.
"""

from pathlib import Path

__version__ = "0.1.0"

_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file():
    __path__.append(str(_root))
