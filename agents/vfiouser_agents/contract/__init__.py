"""The contract of an agent, as checks that run against a live agent; `vfiouser_agents.testing` is the entry point."""
