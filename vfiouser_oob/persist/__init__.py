"""Data that outlives the daemon: small files that may be lost or stale without harm, and memory for its successor."""
