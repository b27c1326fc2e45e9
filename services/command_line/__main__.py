"""`python -m services.command_line` is `distributor`."""

from services.command_line.main import main

main()
