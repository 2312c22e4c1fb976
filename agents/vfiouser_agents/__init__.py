"""Agents: how the daemon reaches the service on the IPU/DPU that can stop, save, load and resume a function."""
