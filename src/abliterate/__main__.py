"""``python -m abliterate``."""

import sys

from abliterate.cli.app import main

sys.exit(main())
