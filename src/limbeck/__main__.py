"""`python -m limbeck`, as torchrun starts it."""

from limbeck.commands import main

main()
