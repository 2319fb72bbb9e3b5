"""Every declared technique: the rows that the generic tests, the report and the documentation are made from."""

from parity_tests.declarations import optim, optim_rest
from parity_tests.declarations.functional import FUNCTIONS
from parity_tests.declarations.init import INITS

OPTIMIZERS = (*optim.OPTIMIZERS, *optim_rest.OPTIMIZERS)

__all__ = ["FUNCTIONS", "INITS", "OPTIMIZERS"]
