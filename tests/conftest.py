"""What holds for all tests: how hypothesis draws."""

from hypothesis import settings

from tests.sizes import QUICK

# The tests of every change are the same each time, so that what fails is what was changed, and no
# clock decides: the machine may be busy. They are a third of what there is (sizes.py); planted bugs
# are looked for with all of it, and `make test-all` draws anew ("--hypothesis-profile=anew").
settings.register_profile(QUICK, derandomize=True, deadline=None, max_examples=34)
settings.register_profile("whole", derandomize=True, deadline=None)
settings.register_profile("anew", derandomize=False, deadline=None)
settings.load_profile(QUICK)
