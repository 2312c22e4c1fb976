"""The daemon's reports about itself: log, status, metrics, events."""
