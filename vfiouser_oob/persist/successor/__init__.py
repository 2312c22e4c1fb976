"""What a successor needs, as values: written into a journal, read out of it, and judged before anything is rebuilt."""
