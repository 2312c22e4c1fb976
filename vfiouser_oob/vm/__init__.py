"""One VM's migration with stock QEMU: its monitor, its carriers, and what is replayed on the other side."""
