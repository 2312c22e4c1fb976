"""The contract of an agent, as checks that run against a live one; `vfiouser_agents.testing` is the way in."""
