"""The command line `retinanet`: the parser in `main`, one module for each command, and what the commands share.

Every command module defines `HELP`, `DESCRIPTION`, `add_arguments(parser)` and `run(args)`. torch and the rest of the
package are imported inside functions, so that `--help` answers at once and needs no optional dependency.
"""
