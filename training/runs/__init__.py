"""A run's folder, and the student in it."""
