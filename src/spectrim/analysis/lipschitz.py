"""Lipschitz bounds of whole networks: a product along each path, a sum where paths join, with the norm of every layer."""

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from spectrim.analysis.operators import Convolution, has_operator, operators_of
from spectrim.analysis.slopes import KNOWN, averaged, constant_of, sliced
from spectrim.analysis.symbols import GRID, sampled_norm, slack, total_strides
from spectrim.errors import LayerError, SettingError
from spectrim.layers.geometry import TRANSPOSED

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
FUNCTIONS = {F.relu, torch.relu, torch.tanh, F.dropout, torch.flatten, operator.getitem, torch.reshape, torch.permute, torch.transpose}
METHODS = {"relu", "tanh", "flatten", "view", "reshape", "permute", "transpose", "contiguous", "squeeze", "unsqueeze"}
SHAPES = {"size", "dim"}
"""Functions and methods whose slope is at most one, and methods that return no tensor."""


@dataclass(frozen=True)
class LayerBound:
    """One layer of a bound.

    Attributes:
        name: of the layer.
        norm: bound on the norm of its operator, a BatchNorm behind it included.
        factors: number of operators it consists of: two for a pair of factors.
        path: Lipschitz constant of its output with respect to the network's input.
    """

    name: str
    norm: float
    factors: int
    path: float


@dataclass(frozen=True)
class Lipschitz:
    """An upper bound on ``||f(x) - f(y)|| / ||x - y||`` in Euclidean norms, with the layers it is made of.

    Attributes:
        bound: of the network.
        layers: in the order of the network.
    """

    bound: float
    layers: tuple[LayerBound, ...]

    def table(self) -> str:
        """Return one line for each layer."""
        width = max([len(layer.name) for layer in self.layers], default=5)
        lines = [f"{layer.name:{width}}  norm {layer.norm:9.4g}  so far {layer.path:9.4g}" for layer in self.layers]
        return "\n".join([*lines, f"{'network':{width}}  Lipschitz constant at most {self.bound:.4g}"])

    def radius(self, output: Tensor, target: Tensor) -> Tensor:
        """Return how far each input may move, in the Euclidean norm, without a change of its class: ``margin / (sqrt(2) bound)``.

        Args:
            output: logits ``(batch, classes)``.
            target: classes ``(batch,)``; an example that is not classified as its own has radius zero.

        Source: Tsuzuku, Sato and Sugiyama, arXiv 1802.04034.
        """
        own = output.gather(1, target[:, None]).squeeze(1)
        others = output.scatter(1, target[:, None], float("-inf")).amax(1)
        return (own - others).clamp(min=0) / (math.sqrt(2) * self.bound)


def lipschitz_bound(model: nn.Module, inputs: Tensor, *, grid: int = GRID) -> Lipschitz:
    """Bound the Lipschitz constant of a network in eval mode, before or after compression.

    Along a path the norms of its layers are multiplied, where paths are added their constants are added. The norm of a convolution is that
    of the operator, see `spectral_norm_bound`, whatever the size of the image; of a pair of factors it is that of their product. BatchNorm
    is multiplied into the layer before it. The bound is for all inputs, and usually far above the largest slope at real ones: compare with
    `lipschitz_lower`. It compares networks, finds the layers that amplify, and proves robustness where norms were limited in training.

    Args:
        model: traced with torch.fx; left as it is.
        inputs: a batch, for the shapes.
        grid: frequencies along each axis, see `spectral_norm_bound`.

    Raises:
        LayerError: for a layer or function whose constant is not known, by its name, and for networks that torch.fx cannot trace.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
        >>> net[0].weight.data, net[2].weight.data = torch.diag(torch.tensor([3.0, 1.0])), torch.tensor([[0.0, 2.0]])
        >>> lipschitz_bound(net, torch.zeros(1, 2)).bound  # 3 * 2; the true constant is 2
        6.0

    Source: Szegedy et al., arXiv 1312.6199, section 4.3 (the product); Gouk et al., arXiv 1804.04368 (residual blocks).
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        root = nn.Sequential(model) if _Tracer().is_leaf_module(model, "") else model
        graph = fx.GraphModule(root, traced(root))
        with torch.no_grad():
            ShapeProp(graph).propagate(inputs[:1])
        return _Bounds(graph, grid).run()
    finally:
        for module, flag in training.items():
            module.training = flag


def lipschitz_lower(model: nn.Module, inputs: Tensor) -> float:
    """Return the largest spectral norm of the Jacobian at some inputs: a lower bound of the Lipschitz constant.

    Args:
        model: called on single examples, in eval mode; left as it is.
        inputs: ``(batch, ...)``.

    Examples:
        >>> net = nn.Linear(2, 2, bias=False)
        >>> net.weight.data = torch.diag(torch.tensor([3.0, 1.0]))
        >>> lipschitz_lower(net, torch.zeros(1, 2))
        3.0
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        largest = 0.0
        if not len(inputs):
            raise SettingError("lipschitz_lower", "inputs", got=tuple(inputs.shape), rule="at least one example")
        for x in inputs:
            one = x[None].detach().requires_grad_()
            with torch.enable_grad():
                output = model(one).flatten()
                rows = [torch.autograd.grad(value, one, retain_graph=True)[0].flatten() for value in output]
            jacobian = torch.stack(rows).double()
            if not bool(torch.isfinite(jacobian).all()):
                raise LayerError(
                    type(model).__name__, "has a slope that is not finite at an input", hint="look for NaN in model and inputs"
                )
            largest = max(largest, float(torch.linalg.matrix_norm(jacobian, 2)))
        return largest
    finally:
        for module, flag in training.items():
            module.training = flag


class _Tracer(fx.Tracer):
    """Looks into everything but what has one operator."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_operator(m) or super().is_leaf_module(m, module_qualified_name)


def traced(model: nn.Module) -> fx.Graph:
    """Return the graph of a model; a LayerError where torch.fx finds none."""
    try:
        return _Tracer().trace(model)
    except Exception as error:
        hint = "the forward may not branch on values"
        raise LayerError(type(model).__name__, f"torch.fx cannot trace it ({error})", hint=hint) from error


def is_operator(module: nn.Module) -> bool:
    """Whether a module is a linear operator that `operators_of` may know."""
    return has_operator(module) and not isinstance(module, TRANSPOSED)


class _Bounds:
    """One pass over a graph: the Lipschitz constant of each node with respect to the input; None for what is no tensor."""

    def __init__(self, graph: fx.GraphModule, grid: int) -> None:
        self.graph, self.grid = graph, grid
        self.modules = dict(graph.named_modules())
        self.constants: dict[fx.Node, float | None] = {}
        self.layers: list[LayerBound] = []

    def run(self) -> Lipschitz:
        placeholders = 0
        for node in self.graph.graph.nodes:
            if node.op == "placeholder":
                placeholders += 1
                if placeholders > 1:
                    raise LayerError(node.name, "is a second input", hint="bounds are for networks of one tensor")
                self.constants[node] = 1.0
            elif node.op == "get_attr":
                self.constants[node] = None
            elif node.op == "output":
                constant = self.constants.get(node.args[0]) if isinstance(node.args[0], fx.Node) else None
                if constant is None:
                    raise LayerError("output", "is not one tensor")
                return Lipschitz(constant, tuple(self.layers))
            else:
                self.constants[node] = self.of(node)
        raise LayerError("output", "is missing")

    def of(self, node: fx.Node) -> float | None:
        known = [self.constants[one] for one in node.all_input_nodes]
        before = [constant for constant in known if constant is not None]
        if not before or node.target in SHAPES or (node.target is getattr and node.args[1] == "shape"):
            return None
        if node.op == "call_module":
            return before[0] * self.of_module(node)
        return self.of_function(node, before)

    def of_module(self, node: fx.Node) -> float:
        """Return the constant of a module; that of a BatchNorm is multiplied into the layer before."""
        module: Any = self.modules[str(node.target)]
        before = self.constants[node.all_input_nodes[0]] or 0.0
        if is_operator(module):
            norm_layer = self.behind(node)
            parts = operators_of(module)
            if norm_layer is not None:
                parts = (*parts[:-1], parts[-1].scaled(scales(norm_layer)))
            check_size(str(node.target), parts, self.shape(node.all_input_nodes[0]))
            norm = bound_of(parts, self.grid)
            self.layers.append(LayerBound(str(node.target), norm, len(parts), before * norm))
            return norm
        if isinstance(module, NORMS):
            source = node.all_input_nodes[0]
            return 1.0 if source.op == "call_module" and self.behind(source) is module else float(scales(module).abs().max())
        return constant_of(str(node.target), module, self.shape(node.all_input_nodes[0]))

    def behind(self, node: fx.Node) -> Any:
        """Return the BatchNorm that alone reads the output of an operator, or None."""
        (user, *others) = node.users or (None,)
        if others or user is None or user.op != "call_module" or not is_operator(self.modules[str(node.target)]):
            return None
        module = self.modules[str(user.target)]
        return module if isinstance(module, NORMS) else None

    def of_function(self, node: fx.Node, before: list[float]) -> float:
        """Return the constant of a node that calls a function or a method."""
        target: Any = node.target
        if target in JOINED and set(node.kwargs) <= {"dim", "axis"}:
            return JOINED[target](self.joined(node))
        numbers = [value for value in node.args if isinstance(value, int | float)]
        if target in (operator.mul, torch.mul, "mul") and len(before) == len(numbers) == 1:
            return before[0] * abs(numbers[0])
        if target in ("mean", torch.mean):
            return before[0] * averaged(node, self.shape(node.all_input_nodes[0]))
        if target in POOLS:
            pool = POOLS[target](
                *node.args[1:], **{key: value for key, value in node.kwargs.items() if key not in ("input", "return_indices")}
            )
            return before[0] * constant_of(node.name, pool, self.shape(node.all_input_nodes[0]))
        if target is F.pad and node.kwargs.get("mode", (*node.args, "constant", "constant")[2]) == "constant":
            return before[0]
        if target is operator.getitem and not sliced(node.args[1]):
            raise LayerError(
                node.name, "indexes with a list or a tensor, which may repeat entries", hint="slices and integers are supported"
            )
        if target is F.dropout and node.kwargs.get("training", (*node.args, None, None)[2]) is not False:
            raise LayerError(node.name, "drops out in eval mode, too", hint="pass training=self.training, or use nn.Dropout")
        if len(before) == 1 and (target in FUNCTIONS if node.op == "call_function" else target in METHODS):
            return before[0]
        raise LayerError(node.name, f"calls {getattr(target, '__name__', target)}, whose Lipschitz constant is not known", hint=KNOWN)

    def joined(self, node: fx.Node) -> list[float]:
        """Return the constants of all arguments of a function, repeated ones each."""
        found: list[float] = []
        fx.node.map_arg((node.args, node.kwargs), lambda one: found.append(self.constants[one] or 0.0))
        return found

    def shape(self, node: fx.Node) -> torch.Size:
        size: torch.Size = node.meta["tensor_meta"].shape
        return size


POOLS: Mapping[Any, type[nn.Module]] = {F.max_pool1d: nn.MaxPool1d, F.max_pool2d: nn.MaxPool2d, F.avg_pool2d: nn.AvgPool2d}
JOINED: Mapping[Any, Callable[[list[float]], float]] = {
    operator.add: sum,
    operator.iadd: sum,
    torch.add: sum,
    operator.sub: sum,
    torch.cat: lambda constants: math.sqrt(sum(constant**2 for constant in constants)),
}
"""Functions that pool, and functions of several tensors."""


def check_size(name: str, parts: tuple[Convolution, ...], shape: torch.Size) -> None:
    """Refuse a circular convolution on a size that its stride does not divide: no symbol bounds it."""
    circular = [axis for part in parts if part.padding_mode == "circular" for axis in range(part.axes)]
    strides = total_strides(parts)
    if any(shape[axis - len(strides)] % strides[axis] for axis in circular):
        raise LayerError(name, f"is circular, and its stride {strides} does not divide the size {tuple(shape)}", hint="pad by zeros")


def bound_of(parts: tuple[Convolution, ...], grid: int) -> float:
    """Return the bound of `spectral_norm_bound` for operators at hand."""
    return float(sampled_norm(parts, grid)) * slack(parts, grid)


def scales(norm: Any) -> Tensor:
    """Return what a BatchNorm in eval mode multiplies each channel by, in float64."""
    if norm.running_var is None:
        raise LayerError(type(norm).__name__, "has no running statistics, so it is no fixed operator")
    scale: Tensor = (norm.running_var.double() + norm.eps).rsqrt()
    return scale if norm.weight is None else scale * norm.weight.detach().double()
