"""`python -m hsa_ultralong` is `hsa`."""

from hsa_ultralong.cli.main import main

main()
