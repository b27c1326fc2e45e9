"""The API service: serves objects from the volume, and starts fetches of missing ones."""
