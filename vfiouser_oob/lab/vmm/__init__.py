"""The part of a VMM that migrates: it follows QEMU's code paths, in both generations of the protocol."""
