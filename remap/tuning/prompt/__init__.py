"""Category 2 of the survey, prompt tuning: learned tokens beside the image's own."""
