"""The command `vppo`, and `python -m vppo`, which is what `accelerate launch -m vppo` needs."""

import sys

from vppo.extras import MissingExtraError, named_extras


def main() -> None:
    """Run the command line, or say in a line which extra it needs."""
    try:
        with named_extras():
            from vppo.cli import main as run
    except MissingExtraError as error:
        sys.exit(f"Error: {error}")
    run()


if __name__ == "__main__":
    main()
