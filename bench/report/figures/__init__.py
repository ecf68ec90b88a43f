"""Which figures a report has, each from the records of its runs."""
