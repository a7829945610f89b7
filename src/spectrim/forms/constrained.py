"""`Sparse`, `Rounded` and `RoundedSparse`: forms of a form, whose parts have zeros, lie on levels, or both."""

from typing import Any, ClassVar

import torch

from spectrim.errors import SettingError
from spectrim.forms.dense import Dense
from spectrim.forms.form import Form
from spectrim.forms.projected import Projected
from spectrim.forms.values import BITS, EXACT
from spectrim.projections.counts import check_keep, count_of


class Sparse(Projected):
    """A form whose matrices keep their largest entries; the others are zero and stay zero in training.

    Entries of several parts are compared by what they change of the weight: a magnitude counts times the mean effect of its part. The
    distortion of a rung is the squared error of its cut; of a dense weight the energy of what is set to zero. Operations are not saved,
    bytes are: `merge` writes ordinary layers with zeros, and `pack` their positions and values.

    Examples:
        >>> import torch
        >>> from spectrim.forms.dense import Dense
        >>> form = Sparse.of(Dense(torch.tensor([[3.0, -1.0], [1.0, -4.0]])), 2)
        >>> form.matrix().detach()
        tensor([[ 3.,  0.],
                [ 0., -4.]])

    Source: Han, Mao and Dally, arXiv 1510.00149 (pruning by magnitude, masked training).
    """

    own: ClassVar[tuple[str, ...]] = ("kept",)

    @classmethod
    def of(cls, form: Form, keep: int | float) -> Any:
        """Return a form that keeps so many entries of another one.

        Args:
            form: of one weight, rounded ones too; it is left as it is.
            keep: a count, or a fraction as a float in (0, 1].

        Raises:
            SettingError: for anything else.
        """
        check_keep("Sparse", keep)
        if isinstance(form, Rounded):
            return Rounded.of(Sparse.of(form.bare(), keep), form._held["bits"])
        made = form if isinstance(form, Sparse) else Sparse.around(form)
        return made.cut_to(made._joined(made.plain_size, {**made._held, "kept": min(made._held["kept"], count_of(keep, made._entries))}))


class Rounded(Projected):
    """A form whose matrices lie on equally spaced levels around zero, ``-m ... m`` steps with ``m = 2^(bits-1) - 1``.

    Each part has one step, that of its least squared error. The distortion of a rung is the squared error of its cut. `merge` writes
    ordinary layers whose weights lie on levels, which `pack` codes by how often each occurs.

    Examples:
        >>> import torch
        >>> from spectrim.forms.dense import Dense
        >>> Rounded.of(Dense(torch.tensor([[0.9, -1.1, 2.1, 0.1]])), 3).matrix().detach()
        tensor([[ 1.0333, -1.0333,  2.0667,  0.0000]])

    Source: Jacob et al., arXiv 1712.05877 (straight-through rounding in training).
    Deviation: the step has the least squared error, and stays between cuts.
    """

    own: ClassVar[tuple[str, ...]] = ("bits",)

    @classmethod
    def of(cls, form: Form, bits: int) -> Any:
        """Return a form whose matrices lie on levels.

        Args:
            form: of one weight, sparse ones too; it is left as it is.
            bits: in [2, 8], or 32 to round nothing yet.

        Raises:
            SettingError: for other bits.
        """
        if bits not in BITS or isinstance(bits, bool):
            raise SettingError("Rounded", "bits", got=bits, rule=f"an integer in [2, 8], or {EXACT} to round nothing")
        if isinstance(form, Rounded):
            form = form.bare() if not isinstance(form, RoundedSparse) else Sparse.of(form.bare(), form._held["kept"])
        made = RoundedSparse.both(form) if isinstance(form, Sparse) else Rounded.around(form)
        return made.cut_to(made._joined(made.plain_size, {**made._held, "bits": bits}))

    @classmethod
    def on(cls, form: Form, step: float) -> Any:
        """Return a dense weight on the levels of a given step, in the fewest bits that reach its largest value.

        Args:
            form: a `Dense` form, which lies on these levels or near them.
            step: between levels.

        Raises:
            SettingError: for another form, or a step of which 8 bits do not reach the largest value.
        """
        if not isinstance(form, Dense) or isinstance(form, Projected) or not step > 0:
            raise SettingError("Rounded", "form and step", got=(form.called, step), rule="a dense weight, and a number above 0")
        largest = round(float(form.W.detach().abs().max()) / step)
        bits = next((bits for bits in BITS if 2 ** (bits - 1) - 1 >= largest), EXACT)
        if bits == EXACT:
            raise SettingError("Rounded", "step", got=step, rule=f"at least {step * largest / 127:.3g}: 8 bits reach 127 steps")
        made = Rounded.around(form)
        made._take({"kept": made._entries, "bits": bits}, {"step_W": torch.tensor(step, dtype=made.learned("W").dtype)})
        return made


class RoundedSparse(Rounded):
    """A form with zeros whose other entries lie on levels: `Rounded` of a `Sparse` form."""

    own: ClassVar[tuple[str, ...]] = ("kept", "bits")

    @classmethod
    def both(cls, form: Sparse) -> Any:
        """Return a form with the zeros of a sparse one that can be rounded."""
        made = cls.over(form._plain)(*form.parameters(recurse=False), dtype=form.dtype, exact=form.exact)
        for mine, theirs in zip(made._parameters.values(), form._parameters.values(), strict=True):
            mine.requires_grad_(bool(theirs is not None and theirs.requires_grad))
        made._take(form._held, {})
        return made.train(form.training)


KINDS: dict[str, type[Projected]] = {kind.__name__: kind for kind in (Sparse, Rounded, RoundedSparse)}
"""Forms of a form by the names under which they are stored."""


def kind_of_form(form: Form) -> str:
    """Return the name in `KINDS` of a form of a form; empty for any other.

    Examples:
        >>> import torch
        >>> from spectrim.forms.dense import Dense
        >>> kind_of_form(Rounded.of(Dense(torch.eye(2)), 4)), kind_of_form(Dense(torch.eye(2)))
        ('Rounded', '')
    """
    return next((name for name, kind in KINDS.items() if type(form).__mro__[1] is kind), "")
