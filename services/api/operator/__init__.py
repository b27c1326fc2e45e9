"""The operator API: orders to the whole node, on a port of its own, each authorised by a token of its own.

Every API process listens on the port and can carry out every order: what is ordered lies in the state store, and all
processes of the node follow it (`shared/runtime/operator_state.py`). Files: `auth` (who may), `schemas` (what requests
say), `commands` (commands and queries), `warming` (the one long work) and `app`.
"""
