"""The SoC simulator: stands in for an IPU/DPU, as a process of its own."""
