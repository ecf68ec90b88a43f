"""One HTML report, its plots and a terminal summary from the folders of runs."""
