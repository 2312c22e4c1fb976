"""From a function's configuration to its device.

Each kind of device is loaded when the first function needs it: a daemon has the memory of the kinds that it serves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vfiouser_oob.config.devices import UpstreamLoss
from vfiouser_oob.config.errors import ConfigError
from vfiouser_oob.config.models import find_model
from vfiouser_oob.config.schema import DmaMode, FunctionConfig, KernelVfioDevice, ModelDevice, UpstreamDevice
from vfiouser_oob.devices.base import DeviceBackend
from vfiouser_oob.devices.model import DeviceModel
from vfiouser_oob.observability import log
from vfiouser_oob.transport.activity import Activity


def make_backend(config: FunctionConfig, activity: Activity) -> DeviceBackend:
    """Build the device of a function.

    Args:
        config: the function.
        activity: the daemon's sockets.

    Raises:
        ConfigError: the device cannot be built as configured.
    """
    return _BUILDERS[config.device.kind](config, activity)


def _model(config: FunctionConfig, activity: Activity) -> DeviceBackend:
    from vfiouser_oob.devices.model_backend import ModelBackend

    device = config.device
    assert isinstance(device, ModelDevice)
    logger = log.get("devices.model").bind(function=config.name, model=device.model)
    try:
        model = find_model(device.model)
    except ConfigError as error:
        raise ConfigError(f"function {config.name!r}: {error}") from error
    try:
        made = model(config.name, device.options)
        if not isinstance(made, DeviceModel):
            raise TypeError(f"it made a {type(made).__name__}, not a DeviceModel")
        return ModelBackend(
            made, dma_by_message=config.dma is DmaMode.MESSAGES, retain_state=config.retain_state, log=logger
        )
    except ConfigError:
        raise
    # The model may be anybody's; its author needs to see where it failed.
    except Exception as error:
        logger.traceback("cannot make a model", error)
        told = f"{type(error).__name__}: {error}"
        raise ConfigError(f"function {config.name!r}: model {device.model} cannot be created: {told}") from error


def _upstream(config: FunctionConfig, activity: Activity) -> DeviceBackend:
    from vfiouser_oob.devices.upstream import UpstreamBackend

    device = config.device
    assert isinstance(device, UpstreamDevice)
    return UpstreamBackend(
        device.socket,
        activity,
        dma_by_message=config.dma is DmaMode.MESSAGES,
        max_write=device.max_write,
        reset_when_lost=device.on_upstream_lost is UpstreamLoss.RESET,
        retain_state=config.retain_state,
    )


def _kernel_vfio(config: FunctionConfig, activity: Activity) -> DeviceBackend:
    from vfiouser_oob.devices.kernel_vfio.backend import KernelVfioBackend
    from vfiouser_oob.devices.kernel_vfio.kernel import LinuxKernel

    device = config.device
    assert isinstance(device, KernelVfioDevice)
    if config.dma is DmaMode.MESSAGES:
        raise ConfigError(
            f'function {config.name!r}: dma = "messages" is not possible for a real function, whose DMA goes through '
            f"the IOMMU into the client's memory files"
        )
    if config.retain_state:
        raise ConfigError(
            f"function {config.name!r}: retain_state = true is not possible for a real function, which the kernel "
            f"resets whenever it is opened"
        )
    return KernelVfioBackend(LinuxKernel(), device.name, device.region_policy, interface=device.interface)


_BUILDERS: Mapping[str, Callable[[FunctionConfig, Activity], DeviceBackend]] = {
    ModelDevice.kind: _model,
    UpstreamDevice.kind: _upstream,
    KernelVfioDevice.kind: _kernel_vfio,
}
