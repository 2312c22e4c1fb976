"""A new section is a class: all that is told of the others follows from it."""

from __future__ import annotations

from functools import partial

import jsonschema
import pytest

from vfiouser_oob.config import ConfigError
from vfiouser_oob.config.load import tables_named
from vfiouser_oob.config.tables import Place, Table, brief, key, keys, read_section, schema_of, section
from vfiouser_oob.config.values import NAME, SIZE, TEXT


@section
class Disk:
    """A table inside another."""

    size: int = key(SIZE, "bytes of the [disk](x.md); rounded up", default=1 << 20)


@section
class Guest:
    """A section with a name."""

    name: str = key(NAME, "its name")
    motto: str = key(TEXT, "what it says", default="100 %", unset="")
    disk: Disk = key(Table.of(Disk), "where it keeps things", factory=Disk)
    line: int | None = None


@section
class House:
    """The sections of a file."""

    guest: tuple[Guest, ...] = key(tables_named("[[guest]]", Guest), "who lives there", default=())


PLACE = Place("top level", "h.toml", lambda *words: len(words))


def test_tables_in_tables_are_read() -> None:
    """With the defaults of what is left out, and the place of each."""
    raw = {"guest": [{"name": "a"}, {"name": "b", "motto": "x", "disk": {"size": "2M"}}]}
    house = read_section(House, raw, PLACE)
    assert (Guest(name="a", line=2), Guest(name="b", motto="x", disk=Disk(size=2 << 20), line=2)) == house.guest


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"guest": []}, "h.toml:1: there must be at least one [[guest]]"),
        ({"guest": [{}]}, "h.toml:3: [[guest]] number 1: key 'name' is missing"),
        ({"guest": [{"name": "a", "disk": 3}]}, "h.toml:4: [[guest]] 'a': disk: must be a table, got 3"),
        (
            {"guest": [{"name": "a", "disk": {"sise": 3}}]},
            "h.toml:4: [[guest]] 'a': disk: unknown key 'sise'; did you mean 'size'? (allowed: size)",
        ),
    ],
)
def test_mistakes_have_their_place(raw: object, message: str) -> None:
    """Also in the tables inside, which are refused by the schema, too."""
    with pytest.raises(ConfigError) as caught:
        read_section(House, raw, PLACE)
    assert message == str(caught.value)
    assert not jsonschema.Draft7Validator(schema_of(House)).is_valid(raw)


def test_help_is_short_and_plain() -> None:
    """The first words of the meaning, without Markdown, and the default."""
    assert "bytes of the disk (default: 1M)" == brief(keys(Disk)["size"])
    assert "bytes of the disk" == brief(keys(Disk)["size"], default=False)


def test_places_lead_to_lines() -> None:
    """A place inside another asks for the line by all the words on the way."""
    asked: list[tuple[object, ...]] = []
    place = Place("x", None, partial(lambda *words: asked.append(words), "a"))
    with pytest.raises(ConfigError, match=r"^x: b: no$"):
        place.inside("b").fail("no", "c")
    assert [("a", "b", "c")] == asked
