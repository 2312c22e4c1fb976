"""A journal in memory that outlives its process. It appends each change that a successor must know."""
