"""The server: functions, their connections, and the daemon that runs them."""
