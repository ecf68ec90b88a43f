"""``python -m bench.simulate NAME|all [--seeds N] [--save docs/measurements]``."""

import argparse
import sys

from bench.simulate.command import add_arguments, complaint, run


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bench.simulate", description="What a policy is worth, with its null case."
    )
    add_arguments(parser)
    arguments = parser.parse_args()
    wrong = complaint(arguments)
    if wrong:
        parser.error(wrong)
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
