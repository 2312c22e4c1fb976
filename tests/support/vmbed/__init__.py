"""The bed for tests with stock QEMU: its assets, and drivers for QEMU, its guest and its qtest mode.

`vmbed.assets` needs nothing but the Python standard library, because it runs before the project's
own environment is known to be complete; this module therefore imports nothing. The drivers are trio.
"""
