"""`python -m distributor_node.services.demo.squid`."""

from distributor_node.services.demo.squid.cli import main

main()
