"""What every service of the distributor node shares: domain, ports, adapters, observability, settings."""
