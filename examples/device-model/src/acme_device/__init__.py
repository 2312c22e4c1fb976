"""A PCI device for vfiouser-oob in a package of its own."""
