#!lua flags=allow-oom
-- ARGV: term, size. A live claim without a reservation gets this one, because its worker will find the
-- partial file. Returns 1 or 0.
local fetch = read_fetch()
if not in_office(ARGV[4]) or (fetch and fetch.reserved) then return 0 end
local size = tonumber(ARGV[5])
if fetch and fetch.standing then
  fetch.reserved, fetch.size = true, size
  write_fetch(fetch)
else
  write_fetch({phase = 'parked', reserved = true, size = size, token = 0, ends = now, since = now, worker = '',
               source = ''})
end
add('reserved', footprint(size))
return 1
