"""The model `nvme`: where its entry point leads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vfiouser_oob.config.models import model
from vfiouser_soc.nvme.options import NvmeOptions

if TYPE_CHECKING:
    from vfiouser_soc.nvme.function import NvmeFunction


@model(NvmeOptions)
def build(name: str, options: NvmeOptions) -> NvmeFunction:
    """Make an NVMe function.

    Args:
        name: the function's name, from which its identifiers are made.
        options: its settings.

    Raises:
        ConfigError: the image cannot be used.
    """
    # Loaded when one is made: a configuration that names the model is read without the controller.
    from vfiouser_soc.nvme.assembly import assemble

    return assemble(name, options)
