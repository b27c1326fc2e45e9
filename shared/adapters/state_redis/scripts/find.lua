#!lua flags=allow-oom
-- Returns the status of the object.
return standing(read_fetch())
