"""Every declared technique: the rows that the generic tests, the report and the documentation are made from."""

from parity_tests.declarations.functional import FUNCTIONS as _FIRST_FUNCTIONS
from parity_tests.declarations.functional_activations import ACTIVATIONS
from parity_tests.declarations.functional_conv import FUNCTIONS as _CONVOLUTIONS
from parity_tests.declarations.functional_layers import LAYERS, POOLING
from parity_tests.declarations.functional_losses import LOSSES
from parity_tests.declarations.functional_norm import FUNCTIONS as _NORMS
from parity_tests.declarations.init import INITS
from parity_tests.declarations.optim import OPTIMIZERS as _ELEMENTWISE
from parity_tests.declarations.optim_reducing import OPTIMIZERS as _REDUCING
from parity_tests.declarations.optim_rest import OPTIMIZERS as _REST

FUNCTIONS = (*_FIRST_FUNCTIONS, *_CONVOLUTIONS, *_NORMS, *ACTIVATIONS, *LOSSES, *POOLING, *LAYERS)
OPTIMIZERS = (*_ELEMENTWISE, *_REST, *_REDUCING)
__all__ = ["FUNCTIONS", "INITS", "OPTIMIZERS"]
