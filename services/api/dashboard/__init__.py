"""The node's page: what the whole deployment does at the moment, on a port of its own."""
