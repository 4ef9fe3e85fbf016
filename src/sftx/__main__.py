"""`python -m sftx` is `sftx`."""

from sftx.cli import main

main()
