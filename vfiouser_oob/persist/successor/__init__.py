"""The values that a successor needs: written into a journal, read from it, and judged before anything is rebuilt."""
