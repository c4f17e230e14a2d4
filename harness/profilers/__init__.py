"""What is measured: one profiler per measurement, switched on by name. See `profilers.base`."""
