"""What a run leaves on disk so that it can be gone on with, and that survives a kill, a full disk and a second run."""
