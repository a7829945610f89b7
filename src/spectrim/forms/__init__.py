"""How one weight is held while it is trained and cut. `FORMS` is the table of forms, by the fold of the weight."""

from spectrim.forms.form import Form, Size
from spectrim.forms.svd import Factors
from spectrim.forms.tucker import Tucker2
from spectrim.linalg.fold import Fold

FORMS: dict[Fold, type[Factors | Tucker2]] = {"channel": Factors, "spatial": Factors, "input": Factors, "tucker": Tucker2}

__all__ = ["FORMS", "Factors", "Form", "Size", "Tucker2"]
