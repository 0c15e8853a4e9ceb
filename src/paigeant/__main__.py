"""`python -m paigeant`: the same as `paigeant`, for whoever doesn't have it on the path."""

from paigeant.cli import main

if __name__ == "__main__":
    main()
