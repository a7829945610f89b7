"""The factorized layers, one file for each kind. `METHODS` is the table of what can be factorized; `register` adds a row."""

from spectrim.forms import Factors, Form
from spectrim.layers.attention import plain_attention
from spectrim.layers.base import FactorizedLayer
from spectrim.layers.exchanged import Share
from spectrim.layers.forwards import renew
from spectrim.layers.kinds import LAWS, METHODS, Example, has_matrix, is_factorized, kind_of, register, row_of
from spectrim.layers.sharded import gathered
from spectrim.layers.site import Site, factor_name, factors_in, named_factors, named_layers, sites
from spectrim.layers.weights import OneWeight

__all__ = [
    "LAWS",
    "METHODS",
    "Example",
    "FactorizedLayer",
    "Factors",
    "Form",
    "OneWeight",
    "Share",
    "Site",
    "factor_name",
    "factors_in",
    "gathered",
    "has_matrix",
    "is_factorized",
    "kind_of",
    "named_factors",
    "named_layers",
    "plain_attention",
    "register",
    "renew",
    "row_of",
    "sites",
]
