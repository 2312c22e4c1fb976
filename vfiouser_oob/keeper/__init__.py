"""A small process that runs another one, keeps descriptors for it and gives them to its successor, as systemd does."""
