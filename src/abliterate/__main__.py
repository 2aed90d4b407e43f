"""``python -m abliterate``."""

import sys

from abliterate.cli import main

sys.exit(main())
