"""An NVMe driver as a guest has it, over the vfio-user client."""
