"""Export of models to files that run without their Python code."""
