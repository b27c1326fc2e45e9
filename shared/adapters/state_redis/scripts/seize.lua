#!lua flags=allow-oom
-- ARGV: term, holder, lease in milliseconds. Returns token and size, or false. No job is carried out under this lease, so
-- none is superfluous.
local fetch = read_fetch()
if not in_office(ARGV[4]) or not fetch or fetch.standing ~= 'parked' then return false end
fetch.phase, fetch.token, fetch.worker = 'fetching', next_serial(), ARGV[5]
fetch.since, fetch.ends, fetch.lasts, fetch.source = now, now + tonumber(ARGV[6]), tonumber(ARGV[6]), ''
fetch.job = 0
write_fetch(fetch)
return {fetch.token, held_size(fetch)}
