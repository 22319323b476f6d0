"""Teacher outputs and frozen features that are computed once; in memory, or on disk for later runs too."""
