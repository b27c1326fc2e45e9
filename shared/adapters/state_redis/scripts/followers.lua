#!lua flags=no-writes
-- KEYS[14]: viewed. ARGV[4]: milliseconds that clients are remembered. Returns views, 1 if all of the object is ordered or
-- pinned, 1 if a process has told of its clients, 1 if a process has clients and does not tell of them, and offsets: for
-- each client the first byte that it needs and the next one that it has not got.
local fetch, lasts = peek_fetch(), tonumber(ARGV[4])
local views, _, ordered, told, known = unpack(following_of(fetch or {}))
local offsets = {}
for _, process in ipairs(known) do
  if process[2] <= now and now - process[2] < lasts then
    for _, offset in ipairs(process[3]) do offsets[#offsets + 1] = offset end
  end
end
local viewed = tonumber(redis.call('ZSCORE', KEYS[14], object_id) or '0')
local untold = viewed > told and now - viewed < lasts
local whole = ordered == 1 or redis.call('SISMEMBER', pins, object_id) == 1
return {views, whole and 1 or 0, told > 0 and 1 or 0, untold and 1 or 0, offsets}
