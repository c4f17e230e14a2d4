"""Two versions of code, measured side by side and judged."""
