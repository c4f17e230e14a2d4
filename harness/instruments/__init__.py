"""What measures one execution, and what the machine can do at most."""
