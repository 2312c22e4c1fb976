"""Servers that behave as vendors' documents say, written without the code that they are to test."""
