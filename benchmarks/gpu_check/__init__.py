"""Whether the toolkit is right on a GPU, and how fast: `make gpu-check`, docs/gpu.md."""
