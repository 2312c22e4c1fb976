"""Device backends: where a function's config space, BARs, interrupts and DMA come from."""
