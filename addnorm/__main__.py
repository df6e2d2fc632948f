"""`python -m addnorm` is the command line."""

import sys

from addnorm.cli import main

if __name__ == "__main__":
    sys.exit(main())
