"""`simulate-soc`: a stand-in for an IPU/DPU with NVMe functions."""

from __future__ import annotations

import argparse

from vfiouser_agents.rpc.kinds import DEFAULT_KIND, SERVED_KINDS
from vfiouser_oob.cli.errors import ExitCode
from vfiouser_oob.cli.long_lived import settle_objects
from vfiouser_oob.cli.options import add_logging_arguments, count, option
from vfiouser_oob.config.devices import read_cmb_size, read_namespace_size
from vfiouser_oob.config.schema import Doorbells, LogFormat, LogLevel
from vfiouser_oob.config.values import read_path, read_size
from vfiouser_protocol.pci_header import FUNCTIONS_PER_BUS
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
        type=option(read_path),
        required=True,
        help="directory for the functions' sockets, f0.sock, f1.sock …",
    )
    parser.add_argument(
        "--functions",
        metavar="N",
        type=count(1, FUNCTIONS_PER_BUS),
        default=1,
        help="how many functions (default: 1)",
    )
    parser.add_argument(
        "--size",
        metavar="BYTES",
        type=option(read_namespace_size),
        help="size of each namespace, for example 64M (default: the image's, or 64M of RAM)",
    )
    parser.add_argument(
        "--image",
        metavar="FILE",
        type=option(read_path),
        help="file behind the namespace; with several functions FILE.0, FILE.1 … (default: RAM)",
    )
    parser.add_argument(
        "--cmb",
        metavar="BYTES",
        type=option(read_cmb_size),
        default=0,
        help="controller memory buffer of each function, at least 2M (default: none)",
    )
    parser.add_argument(
        "--doorbells",
        choices=[way.value for way in Doorbells],
        default=Doorbells.TRAPPED.value,
        help="as messages, or in shared memory that the controller polls (default: trapped)",
    )
    parser.add_argument(
        "--retain-state",
        action="store_true",
        help="let a client find what the one before it left in registers and device memory, which are new otherwise",
    )
    parser.add_argument(
        "--shared-image",
        action="store_true",
        help="other simulators may use the image too, if they say so as well",
    )
    _add_agent_arguments(parser)
    add_logging_arguments(parser)


def _add_agent_arguments(parser: argparse.ArgumentParser) -> None:
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument(
        "--device-only",
        dest="part",
        action="store_const",
        const=SocPart.DEVICE,
        help="play the functions; the agent is another process (--agent-only), if there is one",
    )
    parts.add_argument(
        "--agent-only",
        dest="part",
        action="store_const",
        const=SocPart.AGENT,
        help="play the agent of the functions that another process plays in the same directory",
    )
    parts.add_argument(
        "--no-agent",
        dest="part",
        action="store_const",
        const=SocPart.NO_AGENT,
        help="functions that nothing can migrate",
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
        choices=SERVED_KINDS,
        default=DEFAULT_KIND,
        help=f"what the agent speaks at its addresses (default: {DEFAULT_KIND})",
    )
    parser.add_argument("--tls-cert", metavar="FILE", type=option(read_path), help="certificate of the agent")
    parser.add_argument("--tls-key", metavar="FILE", type=option(read_path), help="its key (default: in --tls-cert)")
    parser.add_argument(
        "--tls-ca",
        metavar="FILE",
        type=option(read_path),
        help="certificates of those who sign clients' certificates (default: clients need none)",
    )
    parser.add_argument(
        "--allow-plaintext", action="store_true", help="allow tcp:// addresses that other hosts can reach"
    )
    parser.add_argument(
        "--state-size",
        metavar="BYTES",
        type=option(read_size),
        default=0,
        help="device memory that each function carries in a migration, up to many gigabytes (default: none)",
    )
    parser.add_argument(
        "--state-churn",
        metavar="BYTES",
        type=option(read_size),
        help="how much of it a running function rewrites per second (default: a 64th)",
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
    import trio

    from vfiouser_oob.observability import log
    from vfiouser_soc.soc import run_soc

    log.configure(options.log_level, options.log_format)
    settle_objects()
    trio.run(run_soc, options)
    return ExitCode.DONE
