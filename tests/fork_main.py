"""The module that a fork of the tests runs, see forks.py."""

from tests.forks import main

if __name__ == "__main__":
    main()
