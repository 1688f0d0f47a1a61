"""`python -m feyntune` is the `feyntune` command."""

from feyntune.cli.main import main

main()
