#!lua flags=allow-oom
-- All of the object is to be fetched, whoever reads it.
local fetch = read_fetch()
if fetch then
  local views, began, _, told, known = unpack(following_of(fetch))
  rewrite_following(fetch, {views, began, 1, told, known})
end
