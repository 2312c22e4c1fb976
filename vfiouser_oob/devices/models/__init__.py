"""Models that come with the daemon."""
