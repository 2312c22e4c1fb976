"""The simulator's agent: the service on the SoC that stops, saves, loads and resumes the simulated functions."""
