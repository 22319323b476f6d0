"""What the commands do: one run, comparisons, repeats, shrinking."""
