"""Benchmarks of the daemon, each beside the lowest cost of the same bytes on the same machine in the same run."""
