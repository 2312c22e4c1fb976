"""Out-of-band migration: the state stream, and the record, machine, runner and transfer that move it."""
