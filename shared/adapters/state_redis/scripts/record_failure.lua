#!lua flags=allow-oom
-- ARGV: reason, milliseconds
redis.call('SET', failure, ARGV[4], 'PX', ARGV[5])
announce('fetch_changed')
