"""What the API pages say of a call: each argument of each public function of the interfaces that others build on."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import vfiouser_oob.client
from vfiouser_agents import api, faults, memory, options, relay
from vfiouser_agents.rpc import server
from vfiouser_conformance import case, facts, link, wire
from vfiouser_oob.devices import model
from vfiouser_protocol import dirty, dma_logging, fields, irq, msix, pci, pci_caps, pci_header, session

#: Whole modules that are public, beside the packages that list their names.
MODULES = (
    *(api, faults, memory, options, relay, server),
    *(case, facts, link, wire),
    *(dirty, dma_logging, fields, irq, msix, pci, pci_caps, pci_header, session),
)
#: What others import; names that start with an underscore are nobody's.
PUBLIC = [
    *(getattr(package, name) for package in (vfiouser_oob.client, model) for name in package.__all__),
    *(
        thing
        for module in MODULES
        for name, thing in vars(module).items()
        if not name.startswith("_") and getattr(thing, "__module__", "") == module.__name__
    ),
]


def calls() -> Iterator[tuple[str, Callable[..., Any], list[str]]]:
    """Each public function and method: its name, itself, and the docstrings that describe it, inherited ones too."""
    for thing in PUBLIC:
        if inspect.isfunction(thing):
            yield thing.__name__, thing, [inspect.getdoc(thing) or ""]
        elif inspect.isclass(thing) and thing.__module__.split(".")[0].startswith("vfiouser"):
            for name, found in inspect.getmembers(thing, inspect.isfunction):
                if not name.startswith("_") and found.__module__.startswith("vfiouser"):
                    owners = [vars(base)[name] for base in thing.__mro__ if name in vars(base)]
                    yield f"{thing.__name__}.{name}", found, [inspect.getdoc(owner) or "" for owner in owners]


CALLS = sorted({(name, call): (name, call, docs) for name, call, docs in calls()}.values(), key=lambda row: row[0])


@pytest.mark.parametrize(("call", "docs"), [row[1:] for row in CALLS], ids=[row[0] for row in CALLS])
def test_every_argument_is_described(call: Callable[..., Any], docs: list[str]) -> None:
    """By name, in `Args`, or in the sentence of a function that needs no more than one."""
    names = [name for name in inspect.signature(call).parameters if name not in ("self", "cls")]
    words = "\n".join(docs)
    unknown = [name for name in names if not re.search(rf"`{name}`|^ +{name}: ", words, re.MULTILINE)]
    assert unknown == [] or (len(names) == 1 and any(text.count("\n") == 0 and text for text in docs)), unknown
