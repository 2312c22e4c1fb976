"""What the daemon remembers beyond its own death: small files that may be lost or stale without harm, and memory that a
successor goes on with.
"""
