"""`python -m ralu`, for `accelerate launch` and where the script is not on the PATH."""

import sys

from .cli import main

sys.exit(main())
