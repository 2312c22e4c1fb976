"""Carriers: stock objects of QEMU that take a function's state along in QEMU's own migration stream."""
