"""What users send, and when: drawn from a seed before a run starts."""
