"""Models of anybody's: found by name, each with the options that it declares itself."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from vfiouser_oob.config import ConfigError, ModelDevice, models, parse_config, parse_device
from vfiouser_oob.config.summary import warnings
from vfiouser_oob.config.tables import NoOptions, key, keys, section
from vfiouser_oob.config.values import FILE, SIZE, TEXT

TEXT_WITH = '[[function]]\nname = "f"\ndevice = { kind = "model", model = "acme", OPTIONS }\n'


class Acme:
    """A device of somebody else's."""

    @section
    class Options:
        """What it can be told."""

        label: str = key(TEXT, "what it is called")
        memory: int = key(SIZE, "bytes of its memory", default=4096)
        rom: Path | None = key(FILE, "file of its option ROM", default=None, unset="no ROM")

        def __post_init__(self) -> None:
            if self.label == "small" and self.memory > 4096:
                raise ValueError("a small one has at most 4096 bytes of memory")

    def __init__(self, name: str, options: Options) -> None:
        self.name, self.options = name, options


def plain(name: str, options: NoOptions) -> tuple[str, NoOptions]:
    """A device that has no options and declares none."""
    return name, options


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both are among the models; a module with a mistake can be imported as well."""
    module = ModuleType("acme_models")
    vars(module).update(Acme=Acme, plain=plain, number=7)
    (tmp_path / "acme_broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "acme_models", module)
    entries = {"acme": "acme_models:Acme", "plain": "acme_models:plain", "lost": "acme_models:nothing"}
    monkeypatch.setattr(models, "BUILT_IN", {**models.BUILT_IN, **entries})


def test_a_class_brings_its_options() -> None:
    """Its own section is what the rest of the table is read by, in a file and in the short form, and described by."""
    text = TEXT_WITH.replace("OPTIONS", 'label = "a,b", memory = "1M"')
    device = parse_config(text, Path("c.toml")).functions[0].device
    assert ModelDevice(model="acme", options=Acme.Options(label="a,b", memory=1 << 20)) == device
    assert "model:acme,label=a,,b,memory=1M" == device.describe()
    assert device == parse_device(device.describe())
    made = models.find_model("acme")("f", device.options)
    assert ("f", device.options) == (made.name, made.options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ('label = "x", memry = 1', "c.toml:3: [[function]] 'f': device: unknown key 'memry'; did you mean 'memory'?"),
        ('label = "x", memory = true', "c.toml:3: [[function]] 'f': device: memory must be a size in bytes such as"),
        ("memory = 1", "c.toml:3: [[function]] 'f': device: key 'label' is missing"),
        ('label = "small", memory = "1M"', "c.toml:3: [[function]] 'f': device: a small one has at most 4096 bytes"),
    ],
)
def test_its_options_are_refused_like_ours(options: str, words: str) -> None:
    """With the file, the line, what came and what is allowed; what it says of two keys counts, too."""
    with pytest.raises(ConfigError) as caught:
        parse_config(TEXT_WITH.replace("OPTIONS", options), Path("c.toml"))
    assert str(caught.value).startswith(words)


def test_its_files_are_looked_for() -> None:
    """A file that an option names and that is not there is worth a warning, whoever's model it is."""
    text = TEXT_WITH.replace("OPTIONS", 'label = "x", rom = "/nowhere/rom"')
    assert "function 'f': rom /nowhere/rom does not exist yet" in warnings(parse_config(text, Path("c.toml")))


def test_a_plain_function_has_no_options() -> None:
    """It needs to declare nothing, and any key is then unknown."""
    assert not keys(models.find_model("plain").options)
    assert ("f", NoOptions()) == models.find_model("plain")("f")
    assert ModelDevice(model="plain") == parse_device("model:plain")
    with pytest.raises(ConfigError, match="unknown key 'size'"):
        parse_device("model:plain,size=1M")


def test_a_model_that_cannot_be_loaded() -> None:
    """The message names the model and why, at its place."""
    with pytest.raises(ConfigError, match=r"model 'lost' \(acme_models:nothing\) cannot be loaded"):
        parse_device("model:lost", "--device")
    with pytest.raises(ConfigError, match="there is no model 'none'"):
        models.find_model("none")


def test_a_model_by_its_place() -> None:
    """`package.module:Class` needs no registration; it is read, described and made as a registered one is."""
    device = parse_device("model:acme_models:Acme,label=x")
    assert ModelDevice(model="acme_models:Acme", options=Acme.Options(label="x")) == device
    assert "model:acme_models:Acme,label=x" == device.describe()
    text = TEXT_WITH.replace("acme", "acme_models:Acme").replace("OPTIONS", 'label = "x"')
    assert device == parse_config(text, Path("c.toml")).functions[0].device
    with pytest.raises(ConfigError, match="key 'label' is missing"):
        parse_device("model:acme_models:Acme")


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("nowhere:Thing", "model 'nowhere:Thing' cannot be loaded: No module named 'nowhere'"),
        ("acme_models:Acmee", "model 'acme_models:Acmee' cannot be loaded: module 'acme_models' has no attribute"),
        ("acme_broken:Thing", "model 'acme_broken:Thing' cannot be loaded: ZeroDivisionError: division by zero"),
        (
            "acme_models:number",
            "model 'acme_models:number' must be a class or a function that makes a device, not a int",
        ),
        (
            "acme_models.Acme",
            "unknown model 'acme_models.Acme' (allowed: acme, lost, nvme, plain, test, package.module:Class)",
        ),
        ("nvmee", "unknown model 'nvmee'; did you mean 'nvme'? (allowed: acme, lost, nvme, plain, test, package.mod"),
    ],
)
def test_places_without_a_model(model: str, reason: str) -> None:
    """Whatever is wrong with somebody's module, it is one line that names the model and the cause."""
    with pytest.raises(ConfigError) as caught:
        parse_device(f"model:{model}")
    assert reason in str(caught.value)
