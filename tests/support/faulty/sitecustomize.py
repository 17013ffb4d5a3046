"""Python imports this module at each start if its folder is in PYTHONPATH. It lets the command fail, see `faults`."""

from tests.support.faults import install

install()
