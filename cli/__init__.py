"""The command line of remap; installed as ``remap_cli``."""

import os
import sys


def _leave_current_folder() -> None:
    """Take the current folder off the search path for modules.

    With ``-m``, as launchers start a module, Python looks there before its own library: a file in a downloaded folder
    that has the name of a module would be run.
    """
    if not sys.flags.safe_path:
        try:
            here = os.getcwd()
        except OSError:  # the folder was deleted, and is not searched
            return
        found_here = here == os.path.dirname(os.path.dirname(__file__))
        if sys.argv[:1] != ["-m"] or sys.path[0] != here or found_here:
            return
        del sys.path[0]
    os.environ["PYTHONSAFEPATH"] = "1"  # for the processes of --devices


_leave_current_folder()  # before anything else is imported
