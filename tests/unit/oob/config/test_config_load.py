"""Configuration files: what is read, and how mistakes are reported."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from vfiouser_oob.config import (
    ConfigError,
    DaemonConfig,
    DmaMode,
    FunctionConfig,
    LogFormat,
    LogLevel,
    ModelDevice,
    UpstreamDevice,
    default_control_socket,
    default_state_directory,
    load_config,
    parse_config,
)
from vfiouser_soc.nvme.options import Doorbells, NvmeOptions

PATH = Path("/etc/vfiouser-oob/config.toml")

FULL = """\
[daemon]
control_socket = "/run/vfiouser-oob/c.sock"
log_level = "debug"
log_format = "json"
reply_budget_s = 2.5

[[function]]
name = "nvme0"
socket = "/run/vfio-user/nvme0.sock"
socket_mode = "0600"
socket_group = "root"
allow_uids = [0, "root", 64055]
device = { kind = "vfio-user", socket = "/run/soc/f0.sock" }

[[function]]
name = "nvme1"
dma = "messages"
retain_state = true
[function.device]
kind = "model"
model = "nvme"
size = "128M"
image = "/var/lib/disk.img"
cmb = "2M"
doorbells = "polled"
"""

MINIMAL = """\
[[function]]
name = "f0"
socket = "/run/f0.sock"
device = { kind = "model", model = "nvme" }
"""


def test_every_key_reaches_the_dataclasses() -> None:
    """A file that uses each key becomes exactly the dataclasses that say the same."""
    expected = DaemonConfig(
        control_socket=Path("/run/vfiouser-oob/c.sock"),
        log_level=LogLevel.DEBUG,
        log_format=LogFormat.JSON,
        reply_budget_s=2.5,
        source=PATH,
        functions=(
            FunctionConfig(
                name="nvme0",
                socket=Path("/run/vfio-user/nvme0.sock"),
                socket_mode=0o600,
                socket_group="root",
                allow_uids=(0, 0, 64055),
                device=UpstreamDevice(socket=Path("/run/soc/f0.sock")),
                line=7,
            ),
            FunctionConfig(
                name="nvme1",
                dma=DmaMode.MESSAGES,
                retain_state=True,
                device=ModelDevice(
                    model="nvme",
                    options=NvmeOptions(
                        size=128 << 20,
                        image=Path("/var/lib/disk.img"),
                        cmb=2 << 20,
                        doorbells=Doorbells.POLLED,
                    ),
                ),
                line=15,
            ),
        ),
    )
    assert expected == parse_config(FULL, PATH)


def test_reading_loads_neither_an_event_loop_nor_a_model() -> None:
    """Mistakes are told at once: a model's options are known without what plays it."""
    code = (
        "import sys; from pathlib import Path; from vfiouser_oob.config.load import parse_config\n"
        f"parse_config({MINIMAL!r}, Path('c.toml'))\n"
        "print([name for name in ('trio', 'vfiouser_soc.nvme.controller') if name in sys.modules])"
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert "[]\n" == done.stdout


def test_defaults() -> None:
    """What is left out takes the documented defaults, the reply budget below stock QEMU's patience."""
    config = parse_config(MINIMAL, PATH)
    assert 4.0 == config.reply_budget_s
    assert LogLevel.INFO == config.log_level
    assert LogFormat.HUMAN == config.log_format
    assert default_control_socket() == config.control_socket
    function = config.functions[0]
    assert (0o660, None, None, DmaMode.FILES) == (
        function.socket_mode,
        function.socket_group,
        function.allow_uids,
        function.dma,
    )


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("socket = ", "sockt = ", 3, ["unknown key 'sockt'", "did you mean 'socket'", "'f0'"]),
        ('name = "f0"', 'name = "a b"', 2, ["name must be", "'a b'"]),
        ('name = "f0"', "name = 7", 2, ["name must be", "7"]),
        ('name = "f0"\n', "", 1, ["key 'name' is missing"]),
        ('"/run/f0.sock"', '"f0.sock"', 3, ["absolute path", "f0.sock"]),
        ('"/run/f0.sock"', f'"/{"x" * 120}"', 3, ["at most 107 bytes"]),
        ('"/run/f0.sock"', '"/run/"', 3, ["not of a directory"]),
        ('"model", ', '"modl", ', 4, ["unknown kind 'modl'", "did you mean 'model'", "vfio-user"]),
        ('kind = "model", ', "", 4, ["'kind' is missing"]),
        ('model = "nvme"', 'model = "nvne"', 4, ["unknown model 'nvne'", "did you mean 'nvme'"]),
        ('model = "nvme"', 'model = "nvme", size = "12Q"', 4, ["size must be", "'12Q'"]),
        ('model = "nvme"', 'model = "nvme", size = 513', 4, ["multiple of 512", "513"]),
        ('model = "nvme"', 'model = "nvme", cmb = "1M"', 4, ["at least 2M"]),
        ('model = "nvme"', 'model = "nvme", sise = 1', 4, ["unknown key 'sise'", "did you mean 'size'"]),
        ('{ kind = "model", model = "nvme" }', '"model:nvme"', 4, ["device: must be a table"]),
        ("[[function]]", "[function]", 1, ["[function] must be written [[function]]"]),
        ("[[function]]", "[[funktion]]", 1, ["unknown key 'funktion'", "did you mean 'function'"]),
        ("[[function]]", "[daemon]\nreply_budget_s = 0\n[[function]]", 2, ["from 0.1 to 3600", "got 0"]),
        ("[[function]]", "[daemon]\nreply_budget_s = true\n[[function]]", 2, ["got True"]),
        ("[[function]]", "[daemon]\nreply_budget_s = nan\n[[function]]", 2, ["got nan"]),
        ("[[function]]", '[daemon]\nlog_level = "loud"\n[[function]]', 2, ['"debug"', "'loud'"]),
        ("[[function]]", "daemon = 3\n[[function]]", 1, ["must be a table, got 3"]),
        ('socket = "', 'socket_mode = 660\nsocket = "', 3, ["octal", "660"]),
        ('socket = "', 'socket_mode = "0999"\nsocket = "', 3, ["octal", "0999"]),
        ('socket = "', 'allow_uids = []\nsocket = "', 3, ["at least one entry"]),
        ('socket = "', 'allow_uids = [-1]\nsocket = "', 3, ["user ids", "-1"]),
        ('socket = "', 'socket_group = "no-such-group"\nsocket = "', 3, ["group of this machine"]),
        ('socket = "', 'dma = "magic"\nsocket = "', 3, ['"files", "messages"', "'magic'"]),
        ('socket = "', 'agent = { kind = "x" }\nsocket = "', 3, ["agent: key 'function' is missing"]),
        ('name = "f0"', 'name = "f0', 2, ["not valid TOML"]),
    ],
)
def test_a_mistake_is_one_line_with_its_place(old: str, new: str, line: int, words: list[str]) -> None:
    """Each mistake names the file, the line, what came and what is allowed, in one line."""
    assert old in MINIMAL
    with pytest.raises(ConfigError) as caught:
        parse_config(MINIMAL.replace(old, new, 1), PATH)
    message = str(caught.value)
    assert message.startswith(f"{PATH}:{line}: ")
    assert "\n" not in message
    for word in words:
        assert word in message


def test_the_second_function_is_found_by_line() -> None:
    """An error in a later function names that function's line, not the first one's."""
    second = MINIMAL.replace("f0", "f1").replace("socket =", "socket_mod =")
    with pytest.raises(ConfigError) as caught:
        parse_config(MINIMAL + "\n" + second, PATH)
    assert 8 == caught.value.line


@pytest.mark.parametrize(
    ("replace", "words"),
    [
        ({}, ["two functions are named 'f0'"]),
        ({'name = "f0"': 'name = "f1"'}, ["socket /run/f0.sock is that of function 'f0' already"]),
    ],
)
def test_names_and_sockets_are_unique(replace: dict[str, str], words: list[str]) -> None:
    """Two functions of one name, or on one socket, are refused at the second one's line."""
    second = MINIMAL
    for old, new in replace.items():
        second = second.replace(old, new)
    with pytest.raises(ConfigError) as caught:
        parse_config(MINIMAL + second, PATH)
    assert 5 == caught.value.line
    for word in words:
        assert word in str(caught.value)


def test_a_function_on_the_control_socket_is_refused() -> None:
    """A function cannot listen where the daemon's own control socket is."""
    with pytest.raises(ConfigError, match="that of the control socket"):
        parse_config('[daemon]\ncontrol_socket = "/run/f0.sock"\n' + MINIMAL, PATH)


def test_a_function_behind_itself_is_refused() -> None:
    """A function whose device is its own socket would wait for itself for ever."""
    text = MINIMAL.replace('kind = "model", model = "nvme"', 'kind = "vfio-user", socket = "/run/f0.sock"')
    with pytest.raises(ConfigError, match="its own socket"):
        parse_config(text, PATH)


def test_the_control_socket_can_be_switched_off() -> None:
    """The word none stands for no control socket."""
    assert parse_config('[daemon]\ncontrol_socket = "none"\n' + MINIMAL, PATH).control_socket is None


def test_user_names_become_ids() -> None:
    """allow_uids takes names of this machine as well as numbers."""
    entry = pwd.getpwall()[-1]
    config = parse_config(MINIMAL + f'allow_uids = ["{entry.pw_name}"]\n', PATH)
    assert (entry.pw_uid,) == config.functions[0].allow_uids


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """A missing file, a directory, binary data and an endless file are one line each."""
    (tmp_path / "binary").write_bytes(b"a = 1\nb = '\xff'\n")
    big = tmp_path / "big"
    with big.open("wb") as file:
        os.truncate(file.fileno(), 64 << 20)
    deep = tmp_path / "deep"
    deep.write_text("a = " + "[" * 100_000)
    cases = {
        tmp_path / "missing": "No such file",
        tmp_path: "Is a directory",
        tmp_path / "binary": ":2: is not UTF-8",
        big: "larger than 4 MiB",
        deep: "not valid TOML",
    }
    for path, words in cases.items():
        with pytest.raises(ConfigError, match=words):
            load_config(path)


@pytest.mark.parametrize(
    ("euid", "environ", "expected"),
    [
        (0, {"XDG_RUNTIME_DIR": "/run/user/0"}, "/run/vfiouser-oob/control.sock"),
        (1000, {"XDG_RUNTIME_DIR": "/run/user/1000"}, "/run/user/1000/vfiouser-oob/control.sock"),
        (1000, {}, "/run/vfiouser-oob/control.sock"),
        (1000, {"XDG_RUNTIME_DIR": "relative"}, "/run/vfiouser-oob/control.sock"),
    ],
)
def test_default_control_socket(euid: int, environ: dict[str, str], expected: str) -> None:
    """Root's daemon is found in /run, a user's in the user's own runtime directory."""
    assert Path(expected) == default_control_socket(euid, environ)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"STATE_DIRECTORY": ""}, None),
        ({"STATE_DIRECTORY": "relative"}, None),
        ({"STATE_DIRECTORY": "/var/lib/x"}, Path("/var/lib/x")),
        ({"STATE_DIRECTORY": "/var/lib/x:/var/lib/y"}, Path("/var/lib/x")),
    ],
)
def test_default_state_directory(environ: dict[str, str], expected: Path | None) -> None:
    """What systemd made for the service, the first one if there are several; nothing without systemd."""
    assert expected == default_state_directory(environ)


def test_the_state_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file wins over systemd, and can switch it off; it has to be an absolute path."""
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/x")
    assert Path("/var/lib/x") == parse_config(MINIMAL, PATH).state_directory
    assert Path("/s") == parse_config('[daemon]\nstate_directory = "/s"\n' + MINIMAL, PATH).state_directory
    assert parse_config('[daemon]\nstate_directory = "none"\n' + MINIMAL, PATH).state_directory is None
    with pytest.raises(ConfigError, match="state_directory must be an absolute path or 'none'"):
        parse_config('[daemon]\nstate_directory = "s"\n' + MINIMAL, PATH)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xef\xbb\xbf[daemon]\n", "c.toml:1: begins with a byte order mark (BOM), which TOML does not allow"),
        ("[daemon]\n".encode("utf-16"), "c.toml:1: is UTF-16 text; TOML is UTF-8"),
    ],
)
def test_what_editors_of_other_systems_save(tmp_path: Path, data: bytes, words: str) -> None:
    """A byte order mark is named, since it cannot be seen."""
    (tmp_path / "c.toml").write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "c.toml")
    assert words in str(caught.value)
