-- KEYS: wanted. ARGV[4]: milliseconds that they are remembered. ARGV[5]: most offsets. Then: offsets.
for index = 6, #ARGV do redis.call('ZADD', KEYS[1], now, ARGV[index]) end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - tonumber(ARGV[4]))
redis.call('ZREMRANGEBYRANK', KEYS[1], 0, -1 - tonumber(ARGV[5]))
redis.call('PEXPIRE', KEYS[1], ARGV[4])
