"""One VM's migration with stock QEMU: its monitor, its carriers, and the replay on the other side."""
