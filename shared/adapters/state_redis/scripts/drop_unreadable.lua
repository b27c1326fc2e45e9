#!lua flags=allow-oom
-- ARGV: object ids. Drops those of their records that cannot be read.
for index = 4, #ARGV do read_object(ARGV[index]) end
