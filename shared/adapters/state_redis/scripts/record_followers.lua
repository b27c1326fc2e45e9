#!lua flags=allow-oom
-- KEYS[14]: viewed. ARGV[4]: process. ARGV[5]: milliseconds that its clients are remembered. ARGV[6]: milliseconds of a view.
-- ARGV[7]: most objects with viewers. Then for each object: object id, 1 if a request has begun since the last report, how
-- many clients, and for each the first byte that it needs and the next one that it has not got.
local process, lasts, view_lasts, viewed = ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6]), KEYS[14]

local function is_recent(at) return at <= now and now - at < lasts end

local index = 8
while index <= #ARGV do
  local id, requested, count = ARGV[index], ARGV[index + 1] == '1', tonumber(ARGV[index + 2])
  local offsets = {}
  for number = 1, 2 * count do offsets[number] = tonumber(ARGV[index + 2 + number]) end
  index = index + 3 + 2 * count
  redis.call('ZADD', viewed, now, id)
  local fetch = peek_fetch(id)
  if fetch then
    local views, began, ordered, _, known = unpack(following_of(fetch))
    -- As ViewCoalescer decides
    if requested and (views == 0 or math.abs(now - began) >= view_lasts) then views, began = views + 1, now end
    local clients = {}
    for _, other in ipairs(known) do
      if other[1] ~= process and is_recent(other[2]) then clients[#clients + 1] = other end
    end
    if count > 0 then clients[#clients + 1] = {process, now, offsets} end
    rewrite_following(fetch, {views, began, ordered, now, clients}, id)
  end
end
redis.call('ZREMRANGEBYRANK', viewed, 0, -1 - tonumber(ARGV[7]))
