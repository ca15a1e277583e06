"""`python -m kvstrata`: the same command line."""

from kvstrata.cli import main

if __name__ == "__main__":
    main()
