"""No client, agent or upstream of one function stops or reads another's: an innocent client tells what it feels."""

import pytest

from hostilekit.catalogue import ATTACKS
from hostilekit.measure import run_case

pytestmark = pytest.mark.hostile


@pytest.mark.parametrize("name", [name for name, case in ATTACKS.items() if not case.proof])
def test_attack(name: str) -> None:
    """A second function is served in time, its client's data are its own, and the daemon is as it was afterwards."""
    print(run_case(ATTACKS[name]))  # noqa: T201  pytest shows it with -rP
