"""What check-config says about a file that can be used."""

from __future__ import annotations

from pathlib import Path

from vfiouser_oob.config import parse_config
from vfiouser_oob.config.summary import summary, warnings

TEXT = """\
[daemon]
control_socket = "/run/c.sock"
reply_budget_s = 30

[[function]]
name = "up"
socket = "/nowhere/up.sock"
socket_mode = "0666"
dma = "messages"
device = { kind = "vfio-user", socket = "/nowhere/soc.sock" }

[[function]]
name = "ram"
allow_uids = [0]
socket_group = "root"
device = { kind = "model", model = "nvme", size = "64M", image = "/d" }
"""


def test_summary() -> None:
    """Each function is one line that says what it is, where, and who may use it."""
    lines = summary(parse_config(TEXT, Path("c.toml")))
    assert [
        "c.toml: good, 2 functions",
        "control socket /run/c.sock",
        "state directory none",
        "reply budget 30 s",
        "log level info, format human",
        "  up: vfio-user:/nowhere/soc.sock on /nowhere/up.sock (mode 0666, dma by messages)",
        "  ram: model:nvme,size=64M,image=/d on socket from systemd (mode 0660, group root, only uids 0)",
    ] == lines


def test_warnings() -> None:
    """Everything that is legal but will surprise on this machine is said, and nothing else."""
    found = warnings(parse_config(TEXT, Path("c.toml")))
    expected = [
        "reply_budget_s is 30",
        "'up': the socket's directory /nowhere does not exist yet",
        "'up': socket_mode 0666 lets every user",
        "'up': no vfio-user server's socket is at /nowhere/soc.sock",
        "'ram': no socket is configured",
        "'ram': image /d does not exist yet",
    ]
    assert len(expected) == len(found)
    for words, warning in zip(expected, found, strict=True):
        assert words in warning


def test_no_warnings(tmp_path: Path) -> None:
    """A plain configuration is silent."""
    text = f'[[function]]\nname = "f"\nsocket = "{tmp_path}/f"\ndevice = {{kind = "model", model = "nvme"}}\n'
    assert [] == warnings(parse_config(text, Path("c.toml")))


def test_state_directory(tmp_path: Path) -> None:
    """Where it is stands in the summary; one that cannot be used is a warning, one that is yet to be made is not."""

    def said(path: Path) -> tuple[str, list[str]]:
        text = TEXT.replace("[daemon]", f'[daemon]\nstate_directory = "{path}"')
        config = parse_config(text, Path("c.toml"))
        return summary(config)[2], [line for line in warnings(config) if "state_directory" in line]

    assert (f"state directory {tmp_path / 'a/b'}", []) == said(tmp_path / "a/b")
    (tmp_path / "file").write_text("")
    _, found = said(tmp_path / "file" / "x")
    assert [f"state_directory {tmp_path}/file/x cannot be used: {tmp_path}/file is not a directory"] == found
    _, found = said(Path("/proc/x"))
    assert 1 >= len(found)  # root may write everywhere, as far as access() tells
