"""Tells Mambench what this repository has."""

import fastmix

from mambench.harness.spec import Family
from mambench.implementations.base import Implementation, Variant


class FastMix(Implementation):
    """Attention of this repository."""

    name = "fastmix"
    families = (Family.ATTENTION,)
    summary = "attention of an example repository"

    def variants(self, device):
        """Return the only one."""
        return (Variant(name="sdpa"),)

    def op(self, family, variant):
        """Return the operation."""
        return fastmix.attention
