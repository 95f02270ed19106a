"""A config becomes jobs, and jobs outcomes."""
