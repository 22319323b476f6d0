"""Category 5 of the survey, knowledge remapping: losses that carry the teacher over to the student."""
