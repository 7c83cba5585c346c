"""Lightning callbacks: the progressive fine-tuning, what a run reports, and its progress bar."""
