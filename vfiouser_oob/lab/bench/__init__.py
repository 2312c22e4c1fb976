"""Benchmarks of the daemon, each beside the least that the same bytes cost on the same machine in the same
run.
"""
