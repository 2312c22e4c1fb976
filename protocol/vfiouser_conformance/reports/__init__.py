"""The reports of a run: a table for people, JSON, JUnit."""
