"""Instruments: a VMM player, an NVMe driver, the demo and the benchmarks. The daemon never uses them."""
