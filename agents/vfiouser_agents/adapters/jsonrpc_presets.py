"""Method maps of interfaces that are published; each says where it is described, and what it cannot do.

`snap3-virtio-blk`: NVIDIA SNAP 3 on BlueField-2, controllers of virtio-blk. Its methods `controller_list`,
`controller_virtio_blk_suspend`, `controller_virtio_blk_resume`, and `controller_virtio_blk_state` with `save` or
`restore` and the path of a file on the DPU. There is no method that tells whether a controller is suspended, none to
reset it, no pre-copy and no dirty log (its `lm_enable` logs over RDMA, which is another protocol). The commands that
move the file, `state.fetch` and `state.store`, are the user's to say, and so is what must be equal on both sides beside
the vendor: `descriptor.fingerprint`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "snap3-virtio-blk": {
        "methods": {
            "functions": {"method": "controller_list", "result": {"list": "", "name": "name"}},
            "stop": {"method": "controller_virtio_blk_suspend", "params": {"name": "$function"}},
            "resume": {"method": "controller_virtio_blk_resume", "params": {"name": "$function"}},
            "save": {"method": "controller_virtio_blk_state", "params": {"name": "$function", "save": "$path"}},
            "load": {"method": "controller_virtio_blk_state", "params": {"name": "$function", "restore": "$path"}},
        },
        "state": {"path": "/tmp/vfiouser-oob-$function.state"},
        "caps": {"max_state": 4 << 20},
        "descriptor": {"format_id": "snap3-virtio-blk", "vendor": "NVIDIA", "model": "SNAP 3", "kind": "virtio-blk"},
    },
}
