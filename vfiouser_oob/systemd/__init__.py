"""Being a good citizen under systemd: readiness, sockets that it opened for us, descriptors that it keeps for us."""
