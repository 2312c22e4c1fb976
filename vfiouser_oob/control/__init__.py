"""The control socket: how the rest of the machine asks a running daemon what it is doing."""
