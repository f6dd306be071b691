"""`python -m qcore`: the same as the command `qcore`."""

from .cli import main

main()
