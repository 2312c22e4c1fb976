"""What the daemon says about itself while it runs."""
