"""Results of frozen networks that are computed once: teacher outputs and frozen features."""
