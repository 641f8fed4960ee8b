"""Entry point of `python -m retinanet`, which is the command `retinanet`."""

import sys

from retinanet.cli.main import main

sys.exit(main())
