#!lua flags=allow-oom
-- ARGV: holder, milliseconds. Returns the term's token, or 0 while another process leads. The key holds "token holder".
relieve()
kept_since()
redis.call('HSETNX', usage, 'format', FORMAT)
local holder, milliseconds = ARGV[4], ARGV[5]
local term = redis.call('GET', leader)
if term then
  local token, leading = string.match(term, '^(%d+) (.*)$')
  if leading ~= holder then
    -- The clock was set back: shorten the term to its length from now
    if redis.call('PTTL', leader) > tonumber(milliseconds) then redis.call('PEXPIRE', leader, milliseconds) end
    return 0
  end
  redis.call('PEXPIRE', leader, milliseconds)
  return tonumber(token)
end
local token = next_serial()
redis.call('SET', leader, string.format('%.0f ', token) .. holder, 'PX', milliseconds)
return token
