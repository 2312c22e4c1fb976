"""Client memory: files behind DMA mappings, and access to them that a hostile client cannot turn into a crash."""
