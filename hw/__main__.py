"""`python -m hw` is `triptych`."""

import sys

from hw.cli import main

sys.exit(main())
