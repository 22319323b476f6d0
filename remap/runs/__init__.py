"""Run directories, task files, comparison and prediction."""
