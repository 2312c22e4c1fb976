"""A machine around an NVMe model without any socket: memory, interrupts, and a small driver."""

from nvmebed.driver import CommandFailed, Driver, Queue
from nvmebed.host import Host, Memory
from nvmebed.machine import Machine, machine, make_function

__all__ = ["CommandFailed", "Driver", "Host", "Machine", "Memory", "Queue", "machine", "make_function"]
