"""The node's pure decisions and values. Nothing here does I/O; time and chance are arguments."""
