"""What holds for all tests: how hypothesis draws."""

from hypothesis import settings

# The tests of every change are the same each time, so that what fails is what was changed, and no
# clock decides: the machine may be busy. `make test-all` draws anew ("--hypothesis-profile=anew").
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("anew", derandomize=False, deadline=None)
settings.load_profile("same")
