"""Many tasks on one backbone: in memory, in one forward pass, and in one folder."""
