"""The evictor: keeps the volume below its limit, and the state store true to the volume.

One is active, by a lease in the state store; the others stand by. Files: `leadership` (who acts), `term_work` (what it
does), `index` (the policy and what it knows), `removals` (taking one object away), `eviction` (the watermarks),
`reconcile` with `adoption`, `partials` and `repair` (volume against state store), `duty` (objects no longer ours),
`scrub` (rot), `evictor` and `wiring` (all of it at work).
"""
