"""The SoC simulator: plays the IPU/DPU whose functions the daemon exports."""
