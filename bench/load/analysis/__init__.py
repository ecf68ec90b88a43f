"""What the records of a run say: metrics, intervals, objectives, comparisons."""
