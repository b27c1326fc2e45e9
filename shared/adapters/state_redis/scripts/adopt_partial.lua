#!lua flags=allow-oom
-- ARGV: term, size. A live claim without a reservation gets this one, because its worker will find the partial file. A
-- reservation that is too small for the file grows. Returns 1 or 0.
local fetch, size = read_fetch(), tonumber(ARGV[5])
if not in_office(ARGV[4]) or (fetch and fetch.reserved and (fetch.standing == 'fetching' or held_size(fetch) >= size)) then
  return 0
end
local before = reservation(fetch)
if fetch and fetch.reserved then
  fetch.held = size
elseif fetch and fetch.standing then
  fetch.reserved, fetch.size = true, size
else
  fetch = {phase = 'parked', reserved = true, size = size, token = 0, ends = now, since = now, worker = '', source = ''}
end
write_fetch(fetch)
add('reserved', reservation(fetch) - before)
return 1
