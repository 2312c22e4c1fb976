"""Attacks on one function of a daemon, and an innocent client of another one that tells what it feels of them."""

from hostilekit.case import Attack, Scene, Stage, attack
from hostilekit.measure import measure, run_case
from hostilekit.verdict import Budget, Verdict

__all__ = ["Attack", "Budget", "Scene", "Stage", "Verdict", "attack", "measure", "run_case"]
