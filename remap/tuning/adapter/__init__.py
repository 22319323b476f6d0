"""Category 3 of the survey, adapter tuning: small modules inside the blocks."""
