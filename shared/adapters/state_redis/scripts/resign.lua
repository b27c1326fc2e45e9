#!lua flags=allow-oom
-- ARGV: term
if in_office(ARGV[4]) then redis.call('DEL', leader) end
