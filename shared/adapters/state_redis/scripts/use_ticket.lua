#!lua flags=allow-oom
-- KEYS[14]: the token id. ARGV: when it was issued in POSIX seconds, milliseconds it is remembered. Returns 1 at its first
-- use. A token issued before this server began to remember may have been used then.
if tonumber(ARGV[4]) < math.floor(kept_since() / 1000) then return 0 end
return redis.call('SET', KEYS[14], '1', 'NX', 'PX', ARGV[5]) and 1 or 0
