"""One HTML report, PNGs and a terminal summary from the folders of runs."""
