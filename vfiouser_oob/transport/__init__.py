"""UNIX sockets that carry messages with file descriptors, and who owns those descriptors."""
