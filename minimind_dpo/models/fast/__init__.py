"""The step's own kernels, and the one door to the modules they stand in for."""
