"""A journal in memory that outlives its process: what a successor has to know, appended as it changes."""
