#!lua flags=allow-oom
-- ARGV: term, inflation, position, basis (see pack_basis), then per entry: object id, frequency, last access, priority. An
-- object that is not in the index may be a partial one: its fetch keeps the fields.
if not in_office(ARGV[4]) then return end
for index = 8, #ARGV, 4 do
  local object = read_object(ARGV[index])
  if object then
    object.frequency, object.last_access, object.priority =
      tonumber(ARGV[index + 1]), tonumber(ARGV[index + 2]), tonumber(ARGV[index + 3])
    write_object(ARGV[index], object)
  else
    local fetch = read_fetch(ARGV[index])
    if fetch and fetch.reserved then
      fetch.views, fetch.last_access, fetch.priority =
        tonumber(ARGV[index + 1]), tonumber(ARGV[index + 2]), tonumber(ARGV[index + 3])
      fetch.since = fetch.written
      write_fetch(fetch, ARGV[index])
    end
  end
end
redis.call('HSET', policy, 'inflation', ARGV[5], 'position', ARGV[6], 'basis', ARGV[7])
if ARGV[6] ~= '' then redis.call('XTRIM', accesses, 'MINID', ARGV[6]) end
