"""`python -m lumiere`, the same as the `lumiere` command (torchrun needs a module)."""

from lumiere.cli import main

if __name__ == "__main__":
    main()
