"""What a run is told as: a table for people, JSON, JUnit."""
