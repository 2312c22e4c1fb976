"""No client, agent or upstream of one function stops or reads another's: an innocent client tells what it feels."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest

from hostilekit.catalogue import ATTACKS
from hostilekit.measure import background
from hostilekit.verdict import Verdict

pytestmark = pytest.mark.hostile

Judge = Callable[[str], Verdict]


@pytest.fixture(scope="module")
def judge(request: pytest.FixtureRequest) -> Iterator[Judge]:
    """Waits for a case's verdict. All cases that are selected begin with the first one, in the background."""
    begun: dict[str, Future[Verdict]] = {}
    with background() as begin:
        # One of several processes that share the tests cannot tell which of them it will be given.
        for item in [] if hasattr(request.config, "workerinput") else request.session.items:
            if isinstance(item, pytest.Function) and "judge" in item.fixturenames:
                name = str(item.callspec.params["name"])
                begun[name] = begin(ATTACKS[name])
        yield lambda name: (begun.get(name) or begin(ATTACKS[name])).result()


@pytest.mark.parametrize("name", [name for name, case in ATTACKS.items() if not case.proof])
def test_attack(judge: Judge, name: str) -> None:
    """A second function is served in time, its client's data are its own, and the daemon is as it was afterwards."""
    print(judge(name))  # noqa: T201  pytest shows it with -rP
