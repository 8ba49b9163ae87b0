"""``python -m reducer``: the same as the console script ``reducer``."""

from reducer.cli import main

if __name__ == "__main__":
    main()
