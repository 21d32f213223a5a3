"""Where and when: the same stages and recipes through submitit."""
