"""`python -m distributor_node.services.command_line` is `distributor`."""

from distributor_node.services.command_line.main import main

main()
