"""HBM traffic by hardware counters, in a child process under Nsight Compute."""
