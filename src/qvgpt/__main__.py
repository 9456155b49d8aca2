"""`python -m qvgpt …`, and so `accelerate launch -m qvgpt train …`."""

import sys

from qvgpt.cli import main

if __name__ == "__main__":
    sys.exit(main())
