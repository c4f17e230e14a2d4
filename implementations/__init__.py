"""What is compared: problems, operations, blocks; found by name."""
