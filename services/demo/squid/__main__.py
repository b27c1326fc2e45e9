"""`python -m services.demo.squid`."""

from services.demo.squid.cli import main

main()
