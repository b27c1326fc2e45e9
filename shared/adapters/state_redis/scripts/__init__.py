"""One Lua script per verb; `records.lua` is put before each of them."""
