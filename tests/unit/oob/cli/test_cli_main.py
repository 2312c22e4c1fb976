"""The command line from the outside: exit codes, one line per error, what is imported when."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vfiouser_oob import __version__
from vfiouser_oob.cli import main as cli
from vfiouser_oob.cli import serve
from vfiouser_oob.cli.errors import CommandFailed, ExitCode, explain
from vfiouser_oob.config import (
    ConfigError,
    DaemonConfig,
    DmaMode,
    FunctionConfig,
    LogFormat,
    LogLevel,
    ModelDevice,
    default_control_socket,
)
from vfiouser_oob.config.devices import device_forms
from vfiouser_protocol.errors import CommandError
from vfiouser_soc import command
from vfiouser_soc.nvme.options import Doorbells, NvmeOptions
from vfiouser_soc.options import SocAgentOptions, SocOptions, SocPart

CONFIG = """\
[daemon]
reply_budget_s = 2
[[function]]
name = "f0"
socket = "/run/it's/f0.sock"
device = { kind = "model", model = "nvme", size = "64M" }
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A good configuration file."""
    path = tmp_path / "config.toml"
    path.write_text(CONFIG)
    return path


def parse(*arguments: str) -> argparse.Namespace:
    """What the real parser makes of a command line."""
    return cli.build_parser(arguments[0]).parse_args(arguments)


def outcome(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command line."""
    try:
        code = cli.main(arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """--version prints the one version number."""
    assert (0, f"vfiouser-oob {__version__}\n", "") == outcome(capsys, "--version")


@pytest.mark.parametrize("name", ["serve", "check-config", "status", "snippet", "simulate-soc"])
def test_help_of_each_command(capsys: pytest.CaptureFixture[str], name: str) -> None:
    """Each sub-command explains itself."""
    code, out, _ = outcome(capsys, name, "--help")
    assert 0 == code
    assert out.startswith(f"usage: vfiouser-oob {name}")


def test_help_of_serve_tells_the_short_forms(capsys: pytest.CaptureFixture[str]) -> None:
    """Each kind of device is there as `--device` takes it, with all its keys, their words and defaults."""
    _, out, _ = outcome(capsys, "serve", "--help")
    for form, options in device_forms().items():
        assert f"  {form}\n" in out
        for key in options:
            assert f"    {key.name}=" in out
    assert "doorbells=trapped|polled  how doorbells arrive (default: trapped)" in out


def test_help_imports_neither_trio_nor_construct() -> None:
    """The list of sub-commands, and `status`, are there at once: nothing heavy is imported for them."""
    script = (
        "import sys; from vfiouser_oob.cli.main import build_parser; build_parser('status').format_help();"
        "print([m for m in ('trio', 'construct', 'asyncio') if m in sys.modules])"
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, check=True)
    assert "[]\n" == done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("explode",), "there is no command 'explode'"),
        (("--colour",), "arguments are required: COMMAND"),
        (("serve",), "either --config FILE or --device"),
        (("serve", "--device", "model:nvme"), "needs --socket-path PATH or --fd N"),
        (("serve", "--socket-path", "/a", "--fd", "3"), "not allowed with argument"),
        (("serve", "--fd", "x", "--device", "model:nvme"), "--fd: must be a number"),
        (("serve", "--socket-path", "/a", "--device", "modle:nvme"), "did you mean 'model'"),
        (("serve", "--socket-path", "/a", "--device", "vfio-user:/a"), "its own socket"),
        (("serve", "--config", "/nowhere.toml"), "/nowhere.toml: cannot be read"),
        (("serve", "--config", "/x", "--device", "model:nvme"), "--device describes one function"),
        (("serve", "--reply-budget", "0", "--config", "/x"), "from 0.1 to 3600"),
        (("check-config", "/nowhere.toml"), "/nowhere.toml: cannot be read"),
        (("simulate-soc",), "--socket-dir"),
        (("simulate-soc", "--socket-dir", "/x", "--functions", "0"), "must be a number from 1 to 256"),
        (("simulate-soc", "--socket-dir", "/x", "--size", "5"), "multiple of 512"),
        (("status", "--control-socket", "none"), "must be a path"),
    ],
)
def test_bad_usage_is_one_line_and_2(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    """Bad usage or configuration: exit code 2, one line on standard error, nothing on standard output."""
    code, out, err = outcome(capsys, *arguments)
    assert (2, "", 1) == (code, out, err.count("\n"))
    assert words in err
    assert err.startswith("vfiouser-oob")


def test_a_failure_is_one_line_and_1(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Something asked for rightly that does not succeed: exit code 1."""
    code, out, err = outcome(capsys, "status", "--control-socket", str(tmp_path / "c"))
    assert (1, "", 1) == (code, out, err.count("\n"))
    assert "no daemon answers" in err


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (ConfigError("bad", "f.toml", 3), ExitCode.USAGE, ["f.toml:3: bad"]),
        (CommandFailed("not verified"), ExitCode.FAILED, ["not verified"]),
        (OSError(98, "Address already in use", "/a"), ExitCode.FAILED, ["/a: Address already in use"]),
        (OSError("in use by pid 7"), ExitCode.FAILED, ["in use by pid 7"]),
        (CommandError("size 0\nrefused"), ExitCode.FAILED, ["size 0 refused"]),
        (KeyError("x"), ExitCode.FAILED, ["internal error: KeyError: 'x'"]),
        (AssertionError(), ExitCode.FAILED, ["internal error: AssertionError: no message"]),
        (KeyboardInterrupt(), ExitCode.FAILED, ["interrupted"]),
        (
            BaseExceptionGroup("g", [CommandFailed("a"), ExceptionGroup("h", [ConfigError("b"), CommandFailed("a")])]),
            ExitCode.USAGE,
            ["a", "b"],
        ),
    ],
)
def test_explanations(error: BaseException, code: ExitCode, lines: list[str]) -> None:
    """Every error, also inside nested groups, is a line per distinct cause; none is a traceback."""
    assert (code, lines) == explain(error)


def test_a_traceback_is_for_the_debug_level(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """--log-level debug adds the traceback to the line, for bug reports."""
    arguments = ("serve", "--config", str(tmp_path / "no.toml"))
    _, _, err = outcome(capsys, *arguments)
    assert "Traceback" not in err
    _, _, err = outcome(capsys, *arguments, "--log-level", "debug")
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("vfiouser-oob: ")


def test_serve_one_function() -> None:
    """The form without a file becomes the configuration that a file with one function would."""
    args = parse(
        *("serve", "--socket-path", "/run/vfio-user/nvme0.sock", "--device", "model:nvme,size=1M"),
        *("--dma", "messages", "--reply-budget", "2", "--log-format", "json", "--log-level", "error"),
    )
    expected = DaemonConfig(
        functions=(
            FunctionConfig(
                name="nvme0",
                socket=Path("/run/vfio-user/nvme0.sock"),
                device=ModelDevice(model="nvme", options=NvmeOptions(size=1 << 20)),
                dma=DmaMode.MESSAGES,
            ),
        ),
        control_socket=default_control_socket(),
        reply_budget_s=2.0,
        log_level=LogLevel.ERROR,
        log_format=LogFormat.JSON,
    )
    assert expected == serve.config_from(args)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("--socket-path", "/run/..x y.sock"), "x_y"),
        (("--socket-path", "/run/ä"), "function"),
        (("--socket-path", "/run/a.sock", "--name", "other"), "other"),
        (("--fd", "5"), "fd5"),
    ],
)
def test_serve_names_its_function(arguments: tuple[str, ...], name: str) -> None:
    """Without --name the function is called after its socket, made fit for logs."""
    config = serve.config_from(parse("serve", "--device", "model:nvme", *arguments))
    assert name == config.functions[0].name


def test_serve_from_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under socket activation one function needs neither path nor descriptor."""
    monkeypatch.setenv("LISTEN_FDS", "1")
    function = serve.config_from(parse("serve", "--device", "model:nvme", "--name", "f0")).functions[0]
    assert (None, None) == (function.socket, function.fd)


def test_options_win_over_the_file(config_file: Path) -> None:
    """Control socket and log options of the command line replace those of the file, and nothing else."""
    config = serve.config_from(
        parse("serve", "--config", str(config_file), "--control-socket", "none", "--log-level", "debug")
    )
    assert (None, LogLevel.DEBUG, LogFormat.HUMAN, 2.0) == (
        config.control_socket,
        config.log_level,
        config.log_format,
        config.reply_budget_s,
    )


def test_the_state_directory_of_the_command_line(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The option wins over file and systemd, in both forms, and can switch it off."""
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/x")
    for form in (("--config", str(config_file)), ("--device", "model:nvme", "--socket-path", "/run/f.sock")):
        found = [
            serve.config_from(parse("serve", *form, *more)).state_directory
            for more in ((), ("--state-directory", "/s"), ("--state-directory", "none"))
        ]
        assert [Path("/var/lib/x"), Path("/s"), None] == found


def test_a_function_on_the_chosen_control_socket_is_refused(config_file: Path) -> None:
    """The check of the file is repeated when an option changed it."""
    args = parse("serve", "--config", str(config_file), "--control-socket", "/run/it's/f0.sock")
    with pytest.raises(ConfigError, match="that of the control socket"):
        serve.config_from(args)


def test_simulate_soc_options(tmp_path: Path) -> None:
    """Every option of the simulator arrives."""
    args = parse(
        *("simulate-soc", "--socket-dir", str(tmp_path), "--functions", "3", "--size", "1G", "--cmb", "2M"),
        *("--image", "/d/x", "--doorbells", "polled", "--log-level", "warning"),
    )
    expected = SocOptions(
        socket_dir=tmp_path,
        functions=3,
        size=1 << 30,
        cmb=2 << 20,
        image=Path("/d/x"),
        doorbells=Doorbells.POLLED,
        log_level=LogLevel.WARNING,
    )
    assert expected == command.options_from(args)


def test_simulate_soc_agent_options(tmp_path: Path) -> None:
    """Every option of the simulator's agent arrives; without them it listens on this host alone."""
    args = parse(
        *("simulate-soc", "--socket-dir", str(tmp_path), "--image", "/d/x", "--shared-image", "--agent-only"),
        *("--agent-listen", "tls://0.0.0.0:7", "--agent-listen", "unix:///a", "--tls-cert", "/c", "--tls-key", "/k"),
        *("--tls-ca", "/ca", "--allow-plaintext", "--state-size", "1G", "--firmware", "2"),
    )
    expected = SocOptions(
        socket_dir=tmp_path,
        image=Path("/d/x"),
        shared_image=True,
        part=SocPart.AGENT,
        agent=SocAgentOptions(
            listen=("tls://0.0.0.0:7", "unix:///a"),
            tls_cert=Path("/c"),
            tls_key=Path("/k"),
            tls_ca=Path("/ca"),
            allow_plaintext=True,
            state_size=1 << 30,
            state_churn=16 << 20,
            firmware="2",
        ),
    )
    assert expected == command.options_from(args)
    plain = command.options_from(parse("simulate-soc", "--socket-dir", str(tmp_path), "--state-churn", "1M"))
    assert SocAgentOptions(listen=("tcp://127.0.0.1:0",), state_churn=1 << 20) == plain.agent
    assert SocPart.ALL is plain.part


@pytest.mark.parametrize(("option", "part"), [("--device-only", "device"), ("--no-agent", "no-agent")])
def test_simulate_soc_parts(tmp_path: Path, option: str, part: str) -> None:
    """What one process plays can be chosen."""
    args = parse("simulate-soc", "--socket-dir", str(tmp_path), option)
    assert SocPart(part) is command.options_from(args).part


def test_check_config(capsys: pytest.CaptureFixture[str], config_file: Path) -> None:
    """A good file is summed up on standard output, its warnings go to standard error, and it is a success."""
    code, out, err = outcome(capsys, "check-config", str(config_file))
    assert 0 == code
    assert out.startswith(f"{config_file}: good, 1 function\n")
    assert "f0: model:nvme,size=64M on /run/it's/f0.sock" in out
    assert "warning: function 'f0': the socket's directory /run/it's does not exist yet" in err


def test_snippet_for_qemu(capsys: pytest.CaptureFixture[str], config_file: Path) -> None:
    """A shell reads the snippet as QEMU options; the device is valid JSON with the budget's timeout."""
    code, out, err = outcome(capsys, "snippet", "qemu", "f0", "--config", str(config_file), "--memory", "2G")
    assert 0 == code
    shown = subprocess.run(
        ["sh", "-c", f'for word in {out}\ndo printf "%s\\n" "$word"; done'],
        capture_output=True,
        text=True,
        check=True,
    )
    words = shown.stdout.splitlines()
    options = dict(zip(words[::2], words[1::2], strict=True))
    device = json.loads(options.pop("-device"))
    assert {
        "-m": "2G",
        "-object": "memory-backend-memfd,id=vfio-user-ram,size=2G,share=on",
        "-machine": "q35,memory-backend=vfio-user-ram",
    } == options
    assert {
        "driver": "vfio-user-pci",
        "id": "vfio-f0",
        "socket": {"type": "unix", "path": "/run/it's/f0.sock"},
        "x-msg-timeout": 3000,
    } == device
    assert "mode 0660" in err


def test_snippet_of_an_unknown_function(capsys: pytest.CaptureFixture[str], config_file: Path) -> None:
    """A wrong name is refused with the nearest one."""
    code, out, err = outcome(capsys, "snippet", "qemu", "f00", "--config", str(config_file))
    assert (2, "") == (code, out)
    assert "did you mean 'f0'" in err


def test_a_closed_pipe_is_no_traceback(config_file: Path) -> None:
    """`vfiouser-oob … | head -0` ends quietly."""
    script = "import sys\nfrom vfiouser_oob.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"}
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-c", script, "snippet", "qemu", "f0", "--config", str(config_file)],
            env=environ,
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(write)
    assert (1, "") == (done.returncode, done.stderr)
