#!lua flags=no-writes
-- KEYS: workers. Returns worker, age in milliseconds and report of each worker that is alive. A report from the future
-- was written before the clock was set back: the next one is due soon.
local alive, all = {}, redis.call('HGETALL', KEYS[1])
for index = 1, #all, 2 do
  local at, lasts, report = string.match(all[index + 1], '^(%d+) (%d+) (.*)$')
  local age = now - tonumber(at)
  if age >= 0 and age < tonumber(lasts) then alive[#alive + 1] = {all[index], age, report} end
end
return alive
