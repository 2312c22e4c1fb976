"""Configuration: TOML files, the short form of the command line, and the dataclasses that both become."""

from vfiouser_oob.config.agents import parse_agent
from vfiouser_oob.config.devices import parse_device
from vfiouser_oob.config.errors import ConfigError
from vfiouser_oob.config.load import load_config, parse_config
from vfiouser_oob.config.schema import (
    AgentConfig,
    CarrierChoice,
    DaemonConfig,
    DeviceConfig,
    DmaMode,
    FunctionConfig,
    Generations,
    KernelVfioDevice,
    Listens,
    LogFormat,
    LogLevel,
    MigrationConfig,
    ModelDevice,
    RegionPolicy,
    UpstreamDevice,
    VfioInterface,
    VmConfig,
    default_control_socket,
    default_state_directory,
)

__all__ = [
    "AgentConfig",
    "CarrierChoice",
    "ConfigError",
    "DaemonConfig",
    "DeviceConfig",
    "DmaMode",
    "FunctionConfig",
    "Generations",
    "KernelVfioDevice",
    "Listens",
    "LogFormat",
    "LogLevel",
    "MigrationConfig",
    "ModelDevice",
    "RegionPolicy",
    "UpstreamDevice",
    "VfioInterface",
    "VmConfig",
    "default_control_socket",
    "default_state_directory",
    "load_config",
    "parse_agent",
    "parse_config",
    "parse_device",
]
