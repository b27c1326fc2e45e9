-- Returns pairs of object id and fetch. Claims that ran out and left nothing are swept out on the way.
local live, all = {}, redis.call('HGETALL', fetches)
for index = 1, #all, 2 do
  local fetch = unpack_fetch(all[index + 1])
  if fetch.standing then
    live[#live + 1] = {all[index], shown(fetch)}
  else
    redis.call('HDEL', fetches, all[index])
  end
end
return live
