"""Migration from the network's existing node: converts its configuration."""
