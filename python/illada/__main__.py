"""`python -m illada`, the same as the `illada` command."""

import sys

from illada.cli import main

sys.exit(main())
