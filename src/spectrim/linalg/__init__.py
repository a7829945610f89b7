"""Mathematics on tensors: folding kernels into matrices, singular value decompositions, polar factors."""

from spectrim.linalg.fold import Fold, from_matrix, leading, to_matrix
from spectrim.linalg.gram import Metric, ProjectedMetric
from spectrim.linalg.polar import polar_factor, polar_schedule, retracted
from spectrim.linalg.spectral import (
    orthogonality_defect,
    pooled_spectrum,
    randomized_svd,
    rank_at_energy,
    spectrum,
    svd,
    svd_of_product,
    tail_energy,
    weighted_spectrum,
    weighted_svd,
)

__all__ = [
    "Fold",
    "Metric",
    "ProjectedMetric",
    "from_matrix",
    "leading",
    "orthogonality_defect",
    "polar_factor",
    "polar_schedule",
    "pooled_spectrum",
    "randomized_svd",
    "rank_at_energy",
    "retracted",
    "spectrum",
    "svd",
    "svd_of_product",
    "tail_energy",
    "to_matrix",
    "weighted_spectrum",
    "weighted_svd",
]
