"""virtio-blk controllers of SNAP 3, as far as suspend, state and resume go; states are files of this host."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import trio

from .spdk import Handler, RpcFault, params_of


@dataclass
class Controller:
    """One controller.

    Args:
        name: its name.
        serial: what must be equal on both sides.
        content: what a migration carries.
    """

    name: str
    serial: str = "S1"
    content: str = "queues and indices"
    suspended: bool = False
    resumed: list[str] = field(default_factory=list)


class Snap3:
    """The methods of a DPU with some controllers.

    Args:
        names: of the controllers.
    """

    def __init__(self, *names: str) -> None:
        self.controllers = {name: Controller(name) for name in names}

    def methods(self) -> dict[str, Handler]:
        """The table for an `SpdkServer`."""
        return {
            "spdk_get_version": self._version,
            "controller_list": self._list,
            "controller_virtio_blk_suspend": self._suspend,
            "controller_virtio_blk_resume": self._resume,
            "controller_virtio_blk_state": self._state,
        }

    def _controller(self, name: str) -> Controller:
        if name not in self.controllers:
            raise RpcFault(-19, "No such device")
        return self.controllers[name]

    async def _version(self, params: dict[str, Any]) -> Any:
        params_of(params)
        return {"version": "SPDK v21.01", "fields": {"major": 21}}

    async def _list(self, params: dict[str, Any]) -> Any:
        params_of(params)
        return [{"name": name, "type": "virtio_blk", "pci_bdf": "ca:00.2"} for name in self.controllers]

    async def _suspend(self, params: dict[str, Any]) -> Any:
        [name] = params_of(params, "name")
        self._controller(name).suspended = True
        return True

    async def _resume(self, params: dict[str, Any]) -> Any:
        [name] = params_of(params, "name")
        controller = self._controller(name)
        if not controller.suspended:
            raise RpcFault(-22, "controller is not suspended")
        controller.suspended = False
        controller.resumed.append(controller.content)
        return True

    async def _state(self, params: dict[str, Any]) -> Any:
        [action] = set(params) & {"save", "restore"} or [""]
        name, path = params_of(params, "name", action)
        controller = self._controller(name)
        if not controller.suspended:
            raise RpcFault(-1, "controller must be suspended")
        file = trio.Path(path)
        if action == "save":
            await file.write_text(json.dumps({"serial": controller.serial, "content": controller.content}))
            return True
        try:
            state = json.loads(await file.read_text())
        except (OSError, ValueError):
            raise RpcFault(-22, "Invalid argument") from None
        controller.content = state["content"]
        return True
