"""How one weight is held while it is trained and cut. `METHODS` is the table of forms, `FORMS` finds one by the fold of the weight."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from spectrim.forms.constrained import Rounded, RoundedSparse, Sparse
from spectrim.forms.cp import CP
from spectrim.forms.dense import Dense
from spectrim.forms.form import Form, Size
from spectrim.forms.quaternion import QuaternionFactors
from spectrim.forms.svd import Factors
from spectrim.forms.tasks import TaskFactors
from spectrim.forms.tensor_train import TensorTrain
from spectrim.forms.tucker import Tucker2
from spectrim.linalg.fold import Fold, to_matrix
from spectrim.tables import Row

FORMS: dict[Fold, type[Factors | Tucker2 | CP | TensorTrain | QuaternionFactors | Dense]] = {
    "channel": Factors,
    "spatial": Factors,
    "input": Factors,
    "tucker": Tucker2,
    "cp": CP,
    "tt": TensorTrain,
    "quaternion": QuaternionFactors,
    "dense": Dense,
}

METHODS: tuple[Row[Callable[[Tensor], Any]], ...] = (
    Row(
        Factors,
        example=lambda kernel: Factors.of(kernel, to_matrix(kernel)),
        card="svd-training",
        laws={"exact distortion", "truncation", "sides held"},
    ),
    Row(Tucker2, example=lambda kernel: Tucker2.of(kernel, to_matrix(kernel, "tucker")), card="tucker", laws={"truncation", "sides held"}),
    Row(CP, example=lambda kernel: CP.of(kernel, to_matrix(kernel, "cp")), card="cp", laws={"truncation", "sides held"}),
    Row(
        TensorTrain,
        example=lambda kernel: TensorTrain.of(kernel, to_matrix(kernel, "tt")),
        card="tensor-train",
        laws={"truncation", "sides held"},
    ),
    Row(
        QuaternionFactors,
        example=lambda kernel: QuaternionFactors.of(kernel, kernel.flatten(1)),
        card="quaternion-svd",
        laws={"exact distortion", "truncation"},
    ),
    Row(
        Dense,
        example=lambda kernel: Dense.of(kernel, kernel.flatten(1)),
        card="rounding",
        laws={"exact distortion", "truncation", "one rung"},
    ),
    Row(
        Sparse,
        example=lambda kernel: Sparse.of(Dense.of(kernel, kernel.flatten(1)), 1.0),
        card="magnitude-pruning",
        laws={"exact distortion", "truncation", "of a form"},
    ),
    Row(
        Sparse,
        example=lambda kernel: Sparse.of(Tucker2.of(kernel, to_matrix(kernel, "tucker")), 1.0),
        card="magnitude-pruning",
        laws={"exact distortion", "truncation", "of a form"},
        label="Sparse, Tucker2",
    ),
    Row(
        Rounded,
        example=lambda kernel: Rounded.of(Dense.of(kernel, kernel.flatten(1)), 32),
        card="rounding",
        laws={"exact distortion", "truncation", "of a form"},
    ),
    Row(
        Rounded,
        example=lambda kernel: Rounded.of(TensorTrain.of(kernel, to_matrix(kernel, "tt")), 32),
        card="rounding",
        laws={"exact distortion", "truncation", "of a form"},
        label="Rounded, TensorTrain",
    ),
    Row(
        RoundedSparse,
        example=lambda kernel: Rounded.of(Sparse.of(Dense.of(kernel, kernel.flatten(1)), 1.0), 32),
        card="rounding",
        laws={"exact distortion", "truncation", "of a form"},
    ),
)
"""Every form: an example is a function that holds a kernel ``(out, in, k...)`` in it, whose outputs are divisible by four."""

LAWS = {
    "exact distortion": "the distortion of a rung is the squared error of its cut, not only a bound of it",
    "truncation": "the distortion of a rung is the squared error of zeros beyond it, not only a bound of it",
    "of a form": "it prunes or rounds the parts of another form, and has no fold; rungs differ in coded bits, not in numbers",
    "one rung": "it has one size, which costs as much as the weight",
    "sides held": "`sides` are parameters or views of them: what is written into them changes the weight",
}
"""What a form may promise beyond the contract of `Form`."""

__all__ = [
    "CP",
    "FORMS",
    "LAWS",
    "METHODS",
    "Dense",
    "Factors",
    "Form",
    "QuaternionFactors",
    "Rounded",
    "RoundedSparse",
    "Size",
    "Sparse",
    "TaskFactors",
    "TensorTrain",
    "Tucker2",
]
