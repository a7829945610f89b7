"""Losses without labels: worked by hand, and probes whose second moment is the curvature."""

import pytest
import torch
from torch import Tensor, nn

import spectrim as sp
from spectrim.errors import SettingError
from spectrim.metrics.distance import Divergence, RelativeDistance, relative_distance, with_outputs
from spectrim.training.parts import Reconstruction


def curvature(loss: RelativeDistance | Divergence, y: Tensor) -> Tensor:
    """The Hessian of the loss of one example at the dense network's output."""
    found: Tensor = torch.autograd.functional.hessian(lambda out: loss(out.unsqueeze(0), y.unsqueeze(0)), y)
    return found


@pytest.mark.parametrize("loss", [RelativeDistance((2.5,)), Divergence()], ids=["distance", "divergence"])
def test_slopes_of_probes_have_the_curvature_as_their_second_moment(loss: RelativeDistance | Divergence) -> None:
    torch.manual_seed(0)
    y = torch.randn(4, dtype=torch.float64)
    outputs = y.repeat(20000, 1).requires_grad_(True)
    (slopes,) = torch.autograd.grad(loss.probe(outputs), outputs)
    torch.testing.assert_close(slopes.T @ slopes / len(slopes), curvature(loss, y), rtol=0.05, atol=0.01)


def test_the_variance_of_the_output_is_the_unit() -> None:
    data = [torch.tensor([[0.0], [2.0]]), (torch.tensor([[4.0], [6.0]]), "a target that nobody reads")]
    pairs = with_outputs(nn.Identity(), data)
    loss = relative_distance(pairs)
    assert loss.variances == (5.0,)
    assert float(loss(torch.full((2, 1), 3.0), torch.full((2, 1), 3.0))) == 0.0
    assert float(sum(loss(torch.full((2, 1), 3.0), wanted) for _, wanted in pairs)) / 2 == pytest.approx(1.0)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = torch.relu(self.up(x))
        return {"hidden": hidden, "scores": self.down(hidden)}


@pytest.mark.parametrize("reconstruct", [None, Reconstruction(steps=20)])
def test_a_network_is_compressed_from_bare_inputs(reconstruct: Reconstruction | None) -> None:
    """Outputs are a tree of tensors; all the ways are tried; scores are shares of the variance."""
    torch.manual_seed(0)
    model, inputs = Two().eval(), [torch.randn(64, 12) for _ in range(3)]
    made = sp.compress(model, inputs, budget=0.6, where="*", progress=False, reconstruct=reconstruct)
    assert made.measured["final"].macs <= 0.6 * made.measured["dense"].macs
    assert not any("not tried" in note for note in made.notes)
    assert made.scores["dense"]["loss"] == 0.0
    assert 0 < made.measured["final"].loss < 1
    assert "of the output's variance lost" in made.stages()
    assert (reconstruct is not None) == any(stage == "reconstructed" for stage in [*made.scores, *made.dropped])
    again = sp.compress(model, inputs, budget=0.6, where="*", progress=False, reconstruct=reconstruct)
    assert again.measured["final"].loss == made.measured["final"].loss


def test_a_loss_without_a_slope_is_noticed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 6)).eval()
    data = [(x, model(x).detach()) for x in (torch.randn(64, 12) for _ in range(3))]
    made = sp.compress(model, data, nn.MSELoss(), 0.6, where="*", progress=False)
    assert any("gradient of the loss vanishes" in note for note in made.notes)
    assert not any("not tried" in note for note in made.notes)


def test_without_labels_nothing_is_fine_tuned() -> None:
    with pytest.raises(SettingError, match="0 without a loss"):
        sp.compress(Two(), [torch.randn(8, 12)], budget=0.5, epochs=1)
