"""Per family: inputs, references and what is judged."""
