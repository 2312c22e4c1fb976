"""Two hosts of real processes, each of which can be killed and started again on its own, and a VMM to migrate with."""
