"""Private servers that tests start, hurt and stop."""
