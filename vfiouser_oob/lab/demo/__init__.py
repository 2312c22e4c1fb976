"""The demonstration: simulator, daemon and a driver as three processes, and proof that the data is right."""
