"""What one host can say of a VM's functions to another one, beforehand: enough to see that a state would be refused.

The document can be written to a file, or asked of the other host. The last word is the destination's agent's: it judges
the state that comes, and may see more than this.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vfiouser_agents.api import Capabilities, Descriptor
from vfiouser_agents.errors import Incompatible
from vfiouser_agents.rpc.wire import to_wire
from vfiouser_oob.migration.descriptor import decode_descriptor, require_similar

#: What a document calls itself, and the version of its layout.
KIND, VERSION = "vfiouser-oob-vm", 1
#: Bytes of the largest document that is read.
MOST_BYTES = 1 << 20


class CounterpartError(ValueError):
    """What came is no such document."""


@dataclass(frozen=True, slots=True)
class FunctionOffer:
    """What a host has under a function's name.

    Args:
        descriptor: what it is; None if its agent did not say.
        formats: the formats of states that it takes.
        problem: why it is not known.
    """

    descriptor: Descriptor | None = None
    formats: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True, slots=True)
class VmOffer:
    """What a host has for a VM.

    Args:
        name: the VM's.
        carriers: the kinds that it takes.
        functions: by name.
    """

    name: str
    carriers: tuple[str, ...]
    functions: Mapping[str, FunctionOffer]

    def to_document(self) -> dict[str, Any]:
        """What JSON holds of it."""
        return {
            "kind": KIND,
            "version": VERSION,
            "vm": self.name,
            "carriers": list(self.carriers),
            "functions": {
                name: {
                    "descriptor": None if offer.descriptor is None else to_wire(offer.descriptor),
                    "formats": list(offer.formats),
                    "problem": offer.problem,
                }
                for name, offer in self.functions.items()
            },
        }

    @classmethod
    def from_document(cls, document: Any) -> VmOffer:
        """Read what another host wrote.

        Args:
            document: as JSON holds it.

        Raises:
            CounterpartError: it is something else, or of another version.
        """
        if not isinstance(document, dict) or document.get("kind") != KIND:
            raise CounterpartError(f"it is not what `migrate-check --export` writes (no kind {KIND!r})")
        if document.get("version") != VERSION:
            raise CounterpartError(f"it is of version {document.get('version')!r}; this program reads {VERSION}")
        functions = document.get("functions")
        if not isinstance(functions, dict) or not isinstance(document.get("vm"), str):
            raise CounterpartError("it names no VM, or no functions")
        offers = {str(name): _function(str(name), value) for name, value in functions.items()}
        return cls(document["vm"], _texts(document.get("carriers")), offers)

    @classmethod
    def read(cls, text: str | bytes) -> VmOffer:
        """Read a document's text.

        Raises:
            CounterpartError: it is something else, or of another version.
        """
        if len(text) > MOST_BYTES:
            raise CounterpartError(f"it has more than {MOST_BYTES} bytes")
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):
            raise CounterpartError("it is not JSON") from None
        return cls.from_document(document)


def _function(name: str, value: Any) -> FunctionOffer:
    if not isinstance(value, dict):
        raise CounterpartError(f"function {name} is not a table")
    descriptor = value.get("descriptor")
    problem = value.get("problem")
    try:
        decoded = None if descriptor is None else decode_descriptor(json.dumps(descriptor).encode())
    except Incompatible as error:
        return FunctionOffer(problem=str(error))
    return FunctionOffer(decoded, _texts(value.get("formats")), problem if isinstance(problem, str) else "")


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(each for each in value if isinstance(each, str)) if isinstance(value, list) else ()


def mismatches(source: VmOffer, destination: VmOffer, carrier: str) -> Mapping[str, str]:
    """Why a destination could not take the states of functions.

    Args:
        source: this host's.
        destination: the other one's.
        carrier: what carries them.

    Returns:
        One sentence, without its end, for each function that is in the way.
    """
    if carrier not in destination.carriers:
        taken = " and ".join(destination.carriers) or "nothing"
        return dict.fromkeys(source.functions, f"{carrier} carries it here, and the VM takes {taken} there")
    found = {name: _mismatch(offer, destination.functions.get(name)) for name, offer in source.functions.items()}
    return {name: reason for name, reason in found.items() if reason}


def _mismatch(ours: FunctionOffer, theirs: FunctionOffer | None) -> str:
    if theirs is None:
        return "the VM has no such function there"
    if theirs.descriptor is None:
        return theirs.problem or "that host does not know what it is"
    if ours.descriptor is None:
        return ""  # whatever keeps this one from being known is a reason by itself
    # As the destination's daemon does it, with what its agent takes.
    takes = Capabilities(formats=theirs.formats)
    try:
        require_similar(ours.descriptor, theirs.descriptor, takes)
    except Incompatible as error:
        return "; ".join(error.reasons)
    return ""
