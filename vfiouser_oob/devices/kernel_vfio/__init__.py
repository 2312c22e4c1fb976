"""The `kernel-vfio` backend: a real PCI function that the kernel's vfio-pci driver holds.

    backend ──► worker ──► openers ──► device (registers, interrupts, reset)
       │                      └──────► dma    (the IOMMU: type1 container or iommufd)
       └──► session ──► regions, irqs, maps

The client gets the kernel's own descriptors for BARs and gives its own for memory and interrupts, so that the data path
is the hardware's. What the daemon does itself are the accesses that are trapped, and the set-up.
"""
