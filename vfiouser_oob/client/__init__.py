"""A vfio-user client: what a VMM is to a server, for the upstream backend, the demo, the benchmarks and the
tests.
"""
