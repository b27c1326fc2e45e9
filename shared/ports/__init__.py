"""The doors to the outside that have two implementations: state store, job queue, catalog. Domain verbs only."""
