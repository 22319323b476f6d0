"""Category 4 of the survey, parameter tuning: few parameters inside existing layers."""
