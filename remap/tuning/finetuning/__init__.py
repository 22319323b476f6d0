"""Category 1 of the survey, fine-tuning: choose which backbone weights train."""
