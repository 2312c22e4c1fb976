"""Out-of-band migration: the state stream, and the engine between the client's interface and the agent."""
