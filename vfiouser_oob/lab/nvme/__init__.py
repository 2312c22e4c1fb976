"""A guest's NVMe driver, over the vfio-user client."""
