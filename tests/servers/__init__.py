"""Private servers that tests start, disturb and stop."""
