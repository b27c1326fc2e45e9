"""Moving over from the network's existing node: its configuration in our words."""
