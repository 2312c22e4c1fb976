"""A good citizen under systemd: readiness, sockets that systemd has opened, descriptors that it keeps."""
