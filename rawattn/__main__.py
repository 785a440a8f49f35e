"""`python -m rawattn` is the command `rawattn`, for a clone that is not installed."""

from .cli import main

if __name__ == "__main__":
    main()
