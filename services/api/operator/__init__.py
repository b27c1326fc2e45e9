"""The operator API: commands to the whole node, on a port of its own. Each request carries a signed one-time token.

Every API process listens on the port and accepts every command. A command changes the operator state in the state
store, and all processes apply it (`shared/runtime/operator_state.py`). Modules: `app` (routes), `auth` (tokens),
`schemas` (request bodies), `commands` (commands and queries), `warming` (cache warming).
"""
