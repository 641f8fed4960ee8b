"""Entry point of `python -m retinanet`, which does the same as the command `retinanet`."""

import sys

from retinanet.cli.main import main

sys.exit(main())
