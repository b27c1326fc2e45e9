"""The evictor keeps the volume below its limit, and the index in the state store true to the volume.

One evictor acts, by a lease in the state store; the others stand by. Modules, in the order in which things happen:
`main` and `evictor` (build and run one), `leader_election` (which one acts), `leader_tasks` (what a leader does, and
when), `index` (the policy and its objects), `eviction` (watermarks and victims), `removal` (of one object),
`reconcile` and `adoption` (volume against index), `integrity` (missing records, corruption), `assignment` (objects no
longer assigned), `operator_state` (backup and purges), `node_import` (objects of an existing node), `source_probes`.
"""
