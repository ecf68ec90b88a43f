"""``python -m bench.simulate NAME|all [--seeds N] [--save docs/measurements]``."""

import argparse
import sys

from bench.simulate.command import add_arguments, run_experiments
from protocol.errors import ConfigError


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bench.simulate", description="What a policy is worth, with its null case."
    )
    add_arguments(parser)
    try:
        return run_experiments(parser.parse_args())
    except ConfigError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
