"""The part of a VMM that migrates: the moves of QEMU's code paths, in both generations of the protocol."""
