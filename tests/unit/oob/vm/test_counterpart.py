"""What hosts say of a VM to each other beforehand, and what one finds in the other's words."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from vfiouser_agents.api import Descriptor
from vfiouser_oob.vm.counterpart import CounterpartError, FunctionOffer, VmOffer, mismatches

CARRIER = "dbus-vmstate"
NVME = Descriptor("acme-nvme", 1, "acme", "a1", "nvme", "1.0", 1 << 20, {"namespace": "7"})


def host(*carriers: str, **functions: FunctionOffer) -> VmOffer:
    """What a host says."""
    return VmOffer("web", carriers or (CARRIER,), functions)


def test_it_survives_the_way() -> None:
    """What is written is read again, whatever is known."""
    said = host(nvme0=FunctionOffer(NVME, ("acme-nvme", "other")), nvme1=FunctionOffer(problem="no contact"))
    assert VmOffer.read(json.dumps(said.to_document())) == said


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        (host(f=FunctionOffer(NVME)), None),
        (host("vhost-user-fs", CARRIER, f=FunctionOffer(NVME), g=FunctionOffer()), None),
        (host(f=FunctionOffer(replace(NVME, format_id="new"), ("new", "acme-nvme"))), None),
        (host(f=FunctionOffer(replace(NVME, format_id="new"))), "format: the source has 'acme-nvme'"),
        (host(f=FunctionOffer(replace(NVME, kind="virtio-blk"))), "kind: the source has 'nvme'"),
        (host(f=FunctionOffer(problem="no contact")), "no contact"),
        (host(g=FunctionOffer(NVME)), "the VM has no such function there"),
        (host("vhost-user-fs", f=FunctionOffer(NVME)), "and the VM takes vhost-user-fs there"),
    ],
)
def test_what_keeps_a_state_from_being_taken(theirs: VmOffer, words: str | None) -> None:
    """As the destination's daemon would find it when the state comes."""
    found = mismatches(host(f=FunctionOffer(NVME)), theirs, CARRIER)
    assert list(found) == ([] if words is None else ["f"])
    assert words is None or words in found["f"]


def test_a_function_that_is_not_known_here_is_not_compared() -> None:
    """Why it is not is a reason by itself."""
    assert not mismatches(host(f=FunctionOffer(problem="no contact")), host(f=FunctionOffer(NVME)), CARRIER)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({}, "no kind 'vfiouser-oob-vm'"),
        ([], "no kind"),
        ({"version": 2}, "of version 2; this program reads 1"),
        ({"functions": []}, "no functions"),
        ({"vm": 7}, "names no VM"),
        ({"functions": {"f": 7}}, "function f is not a table"),
    ],
)
def test_other_documents_are_refused(document: Any, words: str) -> None:
    """In words for whoever named the file."""
    good = host(f=FunctionOffer(NVME)).to_document()
    text = json.dumps({**good, **document} if document else document)
    with pytest.raises(CounterpartError, match=words):
        VmOffer.read(text)


@pytest.mark.parametrize("text", ["", "[" * 9000, b"\xff", " " * (2 << 20)], ids=["empty", "deep", "bytes", "huge"])
def test_what_is_no_document_at_all(text: str | bytes) -> None:
    """Nothing of it is looked at."""
    with pytest.raises(CounterpartError):
        VmOffer.read(text)


def test_a_descriptor_that_cannot_be_used_is_a_problem_of_its_function() -> None:
    """The others are compared all the same."""
    document = host(f=FunctionOffer(NVME), g=FunctionOffer(NVME)).to_document()
    document["functions"]["f"]["descriptor"] = {"kind": 7}
    found = mismatches(host(f=FunctionOffer(NVME), g=FunctionOffer(NVME)), VmOffer.from_document(document), CARRIER)
    assert list(found) == ["f"]
