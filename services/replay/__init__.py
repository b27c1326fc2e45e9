"""What another policy, cache size or setting would have made of the traffic in one's own access logs.

Files: `log_lines` (one line of a log), `recording` (many lines, packed), `reading` (files, gzip, sampling), `scenarios`
(what is tried), `run` (trying it), `report` (table and recommendation), `chart` (the picture).
"""
