"""The vfio-user protocol as pure functions and state machines: bytes in, messages out; no I/O, no clock."""
