"""One page about a run or a comparison: ``report.html`` in its folder."""

import logging

# It says that it builds a cache of fonts, and where that cache is if there is no home; neither matters to a reader.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
