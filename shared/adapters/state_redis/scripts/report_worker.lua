-- KEYS: workers. ARGV[3]: worker. ARGV[4]: milliseconds until it expires. ARGV[5]: report.
redis.call('HSET', KEYS[1], ARGV[3], string.format('%.0f %s %s', now, ARGV[4], ARGV[5]))
