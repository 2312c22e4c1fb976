"""Hosts with libvirt on one machine: a libvirtd each, in namespaces of its own, and a guest that moves between them."""
