"""The demo: a storage node that can be told to misbehave, media, and a page that shows them."""
