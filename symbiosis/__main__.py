"""`python -m symbiosis`, where the command `symbiosis` is not on the path."""

from symbiosis.cli.app import main

main()
