"""The shipped experiments, one YAML each."""
