"""Adapters: clients of agents, one module per protocol."""
