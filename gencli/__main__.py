"""``python -m gencli``."""

import sys

from gencli.cli import main

sys.exit(main())
