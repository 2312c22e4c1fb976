"""Remote procedure calls over byte streams: one core, a codec per protocol, and a server for agents."""
