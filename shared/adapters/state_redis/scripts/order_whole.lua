#!lua flags=allow-oom
-- Has the whole object fetched, wherever its viewers are.
local fetch = read_fetch()
if fetch then
  local views, began, _, told, known = unpack(following_of(fetch))
  rewrite_following(fetch, {views, began, 1, told, known})
end
