"""`python -m vlp`, which torchrun needs."""

from vlp.cli import main

main()
