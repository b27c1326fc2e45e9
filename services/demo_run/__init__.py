"""`make run`: a node to look at. Not part of the wheel, as the demo itself."""
