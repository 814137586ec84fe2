"""`python -m capsrun` is the same as `capsrun`."""

import sys

from capsrun.cli import main

sys.exit(main())
