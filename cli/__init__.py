"""The command line of remap; installed as ``remap_cli``."""

import os
import sys


def _leave_current_folder() -> None:
    """Asked for a module (``-m``, as launchers do), Python looks in the current folder first, before its own library.
    That folder may be a stranger's, and any file there that is called like a module would be run."""
    if not sys.flags.safe_path:
        try:
            here = os.getcwd()
        except OSError:  # it is gone, and not looked in
            return
        found_here = here == os.path.dirname(os.path.dirname(__file__))
        if sys.argv[:1] != ["-m"] or sys.path[0] != here or found_here:
            return
        del sys.path[0]
    os.environ["PYTHONSAFEPATH"] = "1"  # for the processes of --devices


_leave_current_folder()  # before anything else is imported

from remap_cli import streams  # noqa: E402

streams.open_closed()  # before any of the modules looks at them
