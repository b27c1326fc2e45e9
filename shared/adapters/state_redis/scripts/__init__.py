"""One Lua script per method of the port. `records.lua` is prepended to each of them."""
