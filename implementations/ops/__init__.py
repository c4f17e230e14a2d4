"""Implementations at the level of the operation, one file each."""
