"""Instruments: a VMM player, an NVMe driver, the demo and the benchmarks. Nothing of the daemon uses them."""
