"""Migration of functions behind Acme's agents with vfiouser-oob."""
