"""The attacks, by kind. A module is imported by whoever carries one of its attacks out; `catalogue` has all of them."""
