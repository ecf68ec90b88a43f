"""Plots and tables as data, and plots as SVG."""
