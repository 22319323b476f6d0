"""One page about a run or a comparison: ``report.html`` in its folder. Imports no torch."""
