"""Attacks on one function of a daemon, and an innocent client of another one that tells what it feels of them."""
