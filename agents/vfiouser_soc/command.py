"""`simulate-soc`: a stand-in for an IPU/DPU with NVMe functions."""

from __future__ import annotations

import argparse

from vfiouser_agents.extras import KIND_EXTRAS, missing
from vfiouser_agents.rpc.kinds import DEFAULT_KIND, SERVED_KINDS
from vfiouser_oob.cli.errors import ExitCode
from vfiouser_oob.cli.long_lived import settle_objects
from vfiouser_oob.cli.options import add_key, add_logging_arguments, count, option
from vfiouser_oob.config.errors import ConfigError
from vfiouser_oob.config.schema import FunctionConfig, LogFormat, LogLevel
from vfiouser_oob.config.values import PATH, SIZE
from vfiouser_protocol.pci_header import FUNCTIONS_PER_BUS
from vfiouser_soc.nvme.options import Doorbells, NvmeOptions
from vfiouser_soc.options import (
    DEFAULT_AGENT_ADDRESS,
    SocAgentOptions,
    SocOptions,
    SocPart,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `simulate-soc`."""
    parser.add_argument(
        "--socket-dir",
        metavar="DIR",
        type=option(PATH.read),
        required=True,
        help="directory for the functions' sockets f0.sock, f1.sock …",
    )
    parser.add_argument(
        "--functions",
        metavar="N",
        type=count(1, FUNCTIONS_PER_BUS),
        default=1,
        help="number of functions (default: 1)",
    )
    add_key(parser, "--size", NvmeOptions, "size", metavar="BYTES")
    image = "file that holds the namespace; with several functions FILE.0, FILE.1 … (default: RAM)"
    add_key(parser, "--image", NvmeOptions, "image", image, metavar="FILE")
    add_key(parser, "--cmb", NvmeOptions, "cmb", metavar="BYTES", default=0)
    add_key(parser, "--doorbells", NvmeOptions, "doorbells", default=Doorbells.TRAPPED.value)
    add_key(parser, "--retain-state", FunctionConfig, "retain_state", action="store_true")
    add_key(parser, "--shared-image", NvmeOptions, "shared", action="store_true")
    _add_agent_arguments(parser)
    add_logging_arguments(parser)


def _add_agent_arguments(parser: argparse.ArgumentParser) -> None:
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument(
        "--device-only",
        dest="part",
        action="store_const",
        const=SocPart.DEVICE,
        help="play only the functions; another process may play the agent (--agent-only)",
    )
    parts.add_argument(
        "--agent-only",
        dest="part",
        action="store_const",
        const=SocPart.AGENT,
        help="play only the agent of the functions that another process plays in this directory",
    )
    parts.add_argument(
        "--no-agent",
        dest="part",
        action="store_const",
        const=SocPart.NO_AGENT,
        help="run no agent, so that nothing can migrate the functions",
    )
    parser.set_defaults(part=SocPart.ALL)
    parser.add_argument(
        "--agent-listen",
        metavar="ADDRESS",
        action="append",
        help="tcp://HOST:PORT, tls://HOST:PORT or unix:///PATH; may be repeated; port 0 takes a free one "
        f"(default: {DEFAULT_AGENT_ADDRESS})",
    )
    parser.add_argument(
        "--agent-protocol",
        metavar="KIND",
        choices=SERVED_KINDS,
        default=DEFAULT_KIND,
        help=f"protocol of the agent at its addresses: {', '.join(SERVED_KINDS)} (default: {DEFAULT_KIND})",
    )
    parser.add_argument("--tls-cert", metavar="FILE", type=option(PATH.read), help="certificate of the agent")
    parser.add_argument("--tls-key", metavar="FILE", type=option(PATH.read), help="its key (default: in --tls-cert)")
    parser.add_argument(
        "--tls-ca",
        metavar="FILE",
        type=option(PATH.read),
        help="certificates of the authorities for clients' certificates (default: clients need none)",
    )
    parser.add_argument(
        "--allow-plaintext", action="store_true", help="allow tcp:// addresses that other hosts can reach"
    )
    parser.add_argument(
        "--state-size",
        metavar="BYTES",
        type=option(SIZE.read),
        default=0,
        help="device memory that each function brings along in a migration, up to many gigabytes (default: none)",
    )
    parser.add_argument(
        "--state-churn",
        metavar="BYTES",
        type=option(SIZE.read),
        help="how much of it a running function rewrites in each second (default: a 64th)",
    )
    parser.add_argument(
        "--firmware", metavar="VERSION", help="firmware version that the functions claim to run (default: 1.0)"
    )


def options_from(args: argparse.Namespace) -> SocOptions:
    """The simulator's options out of the command line."""
    return SocOptions(
        socket_dir=args.socket_dir,
        functions=args.functions,
        size=args.size,
        image=args.image,
        cmb=args.cmb,
        shared_image=args.shared_image,
        retain_state=args.retain_state,
        doorbells=Doorbells(args.doorbells),
        part=args.part,
        agent=SocAgentOptions(
            listen=tuple(args.agent_listen or (DEFAULT_AGENT_ADDRESS,)),
            protocol=args.agent_protocol,
            tls_cert=args.tls_cert,
            tls_key=args.tls_key,
            tls_ca=args.tls_ca,
            allow_plaintext=args.allow_plaintext,
            state_size=args.state_size,
            state_churn=args.state_size // 64 if args.state_churn is None else args.state_churn,
            firmware=args.firmware,
        ),
        log_level=LogLevel(args.log_level or LogLevel.INFO),
        log_format=LogFormat(args.log_format or LogFormat.HUMAN),
    )


def run(args: argparse.Namespace) -> int:
    """Play the SoC until told to stop."""
    options = options_from(args)
    extra = KIND_EXTRAS.get(options.agent.protocol)
    lacking = missing(extra) if extra is not None and options.part is not SocPart.NO_AGENT else None
    if lacking is not None:
        raise ConfigError(f"--agent-protocol {options.agent.protocol}: {lacking}")
    import trio

    from vfiouser_oob.observability import log
    from vfiouser_soc.soc import run_soc

    log.configure(options.log_level, options.log_format)
    settle_objects()
    trio.run(run_soc, options)
    return ExitCode.DONE
