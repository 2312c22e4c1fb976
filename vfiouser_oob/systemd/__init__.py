"""Being a good citizen under systemd: readiness, and sockets that it opened for us."""
