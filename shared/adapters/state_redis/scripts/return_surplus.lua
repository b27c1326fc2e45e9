#!lua flags=allow-oom
-- ARGV: token, worker. Releases what is reserved beyond the size.
local fetch = read_leased(ARGV[4], ARGV[5])
if fetch and fetch.held then
  local before = reservation(fetch)
  fetch.held = nil
  write_fetch(fetch)
  add('reserved', reservation(fetch) - before)
  announce('space_freed')
end
