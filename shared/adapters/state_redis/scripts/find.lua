#!lua flags=no-writes
-- Returns the status of the object.
return standing(peek_fetch())
