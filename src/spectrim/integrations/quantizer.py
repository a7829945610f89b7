"""Merged networks in the folders of transformers: ``model.save_pretrained(folder)``, ``AutoModel.from_pretrained(folder)``.

Registered as the quantization method ``spectrim``, in the way that transformers offers: the plan is in ``config.json``, the layers are
exchanged before the weights are read, no code of the folder is run. ``import spectrim`` registers it.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from spectrim.errors import FormatError, LayerError
from spectrim.layers import is_factorized
from spectrim.storage.rebuild import replayed
from spectrim.storage.save import plan_of
from spectrim.surgery.exchange import FINISHED

METHOD = "spectrim"
"""Name of the quantization method."""


@register_quantization_config(METHOD)
class SpectrimConfig(QuantizationConfigMixin):
    """What ``config.json`` says of a merged network.

    Args:
        plan: see `spectrim.storage.save.plan_of`.
        tied: ``{name of a parameter: the name it is stored under}``, where both are the same one.
        factorized: whether the weights beside are factors, which transformers cannot load.
    """

    def __init__(self, plan: dict[str, Any] | None = None, tied: dict[str, str] | None = None, factorized: bool = False, **_: Any) -> None:
        self.quant_method: Any = METHOD
        self.factorized = factorized
        self.plan: dict[str, Any] = plan or {}
        self.tied: dict[str, str] = tied or {}


@register_quantizer(METHOD)
class SpectrimQuantizer(HfQuantizer):
    """Exchanges layers as in the plan before transformers reads their weights."""

    quantization_config: SpectrimConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise a FormatError for a folder of factors, whose weights transformers would replace by random ones."""
        if self.quantization_config.factorized:
            hint = "a LowRankTrainer resumes from a checkpoint; merge the network before it is saved for from_pretrained"
            raise FormatError("config.json", "is of a factorized network, which transformers cannot load", hint=hint)

    def is_serializable(self) -> bool:
        """Return True: a merged network consists of plain tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: nothing is rounded."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """True, so that a ``Trainer`` takes a network that was loaded."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True: layers are ordinary ones."""
        return True

    def _process_model_before_weight_loading(self, model: Any, **more: Any) -> Any:
        config = given = self.quantization_config
        if config.plan.get("model") != type(model).__name__:
            self.quantization_config = config = _renamed(config, model)
        built: Any = replayed(model, config.plan, Path("config.json"))
        for name, module in built.named_children():
            setattr(model, name, module)
        state = model.state_dict()
        own = {name: kept for name, kept in model.all_tied_weights_keys.items() if name in state and kept in state}
        model.all_tied_weights_keys = (own if config is not given else {}) | config.tied
        return model

    def _process_model_after_weight_loading(self, model: Any, **more: Any) -> Any:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, kept in self.quantization_config.tied.items():
            owner, _, leaf = name.rpartition(".")
            if name not in parameters or kept not in parameters:
                raise FormatError("config.json", f"ties '{name}' to '{kept}', which {type(model).__name__} does not have")
            setattr(model.get_submodule(owner), leaf, parameters[kept])
        for name in self.quantization_config.plan.get("frozen", ()):
            model.get_parameter(name).requires_grad_(False)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
        """Write the plan of the network as it is now into its config, and return each tensor once.

        Raises:
            LayerError: for a factorized network, one whose tensors differ in dtype (transformers reads all in one), or one that its plan
            does not describe.
        """
        problem = _why_not(model)
        if problem is not None:
            hint = "save_pretrained(model, folder) of spectrim.integrations.pretrained writes it"
            raise LayerError(type(model).__name__, problem, hint=hint)
        state, tied, first = dict[str, Tensor](), dict[str, str](), dict[int, str]()
        for name, tensor in model.state_dict(keep_vars=True).items():
            if id(tensor) in first:
                tied[name] = first[id(tensor)]
            else:
                first[id(tensor)] = name
                state[name] = tensor.detach()
        config = SpectrimConfig(plan_of(model), tied)
        _check_replay(model, config.plan)
        self.quantization_config = config
        model.config.quantization_config = self.quantization_config
        return state, {}


def _renamed(config: SpectrimConfig, model: Any) -> SpectrimConfig:
    """Return what a config says of a network without its head, or with another one, as transformers loads weights into these.

    Names lose the prefix of the base model where `model` is one, and get it where the stored network was; the rest is left out.
    """
    prefix, whole = f"{model.base_model_prefix}.", hasattr(model, model.base_model_prefix)
    cut = not whole and any(name.startswith(prefix) for name in (*config.plan["merged"], *config.plan["factorized"]))
    added = whole and not any(name.startswith(prefix) for name in (*config.plan["merged"], *config.plan["factorized"]))

    def named(name: str) -> str | None:
        if cut:
            return name.removeprefix(prefix) if name.startswith(prefix) else None
        own = prefix + name if added else name
        return own if own.startswith(prefix) else None

    held = {name for name, _ in model.named_modules()}

    def of(part: Any) -> Any:
        if isinstance(part, dict):
            return {new: value for name, value in part.items() if (new := named(name)) is not None}
        return [new for name in part if (new := named(name)) is not None]

    plan = dict(config.plan) | {"model": type(model).__name__}
    plan |= {key: of(plan[key]) for key in ("factorized", "ranks", "merged", "channels_last", "frozen") if key in plan}
    for key in ("factorized", "merged"):  # layers of a head that is not there
        plan[key] = {name: value for name, value in plan[key].items() if name in held}
    plan["folded"] = {key: of(names) for key, names in plan.get("folded", {}).items()}
    tied = {new: kept for name, other in config.tied.items() if (new := named(name)) and (kept := named(other))}
    return SpectrimConfig(plan, tied)


def _check_replay(model: Any, plan: dict[str, Any]) -> None:
    """Raise a LayerError unless the plan, replayed on the architecture of the config, gives the tensors of the network."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        dense = type(model)(config)
    built = replayed(dense, plan, Path("config.json")).state_dict()
    for name, tensor in model.state_dict().items():
        if name not in built or built[name].shape != tensor.shape:
            problem = f"its '{name}' is not what the plan of the layers describes: it was merged more than once, or changed since"
            raise LayerError(type(model).__name__, problem, hint="factorize and merge the dense network")


def _why_not(model: nn.Module) -> str | None:
    """Return why transformers cannot hold a network, or None."""
    if any(is_factorized(module) for module in model.modules()):
        return "is factorized, and transformers would save its factors without their forms"
    dtypes = {tensor.dtype for tensor in model.state_dict().values() if isinstance(tensor, Tensor) and tensor.is_floating_point()}
    return f"has tensors of several dtypes ({', '.join(sorted(map(str, dtypes)))})" if len(dtypes) > 1 else None


def mark(model: nn.Module) -> None:
    """Let transformers save a merged network as what it is, not as incomplete weights of the original.

    A factorized one is saved as any network of one's own, its factors in a state dict: checkpoints of a ``Trainer`` hold these. Its
    config says so, so that ``from_pretrained`` refuses them.
    """
    if not isinstance(model, PreTrainedModel):
        return
    network: Any = model
    held, factorized = getattr(network, "hf_quantizer", None), any(map(is_factorized, model.modules()))
    if factorized and isinstance(held, SpectrimQuantizer):  # it was merged before
        held.remove_quantization_config(network)  # type: ignore[no-untyped-call]
        held = None
    if held is not None or not isinstance(getattr(network.config, "quantization_config", None), SpectrimConfig | None):
        return
    network.config = copy.deepcopy(network.config)
    network.config.quantization_config = SpectrimConfig(factorized=factorized)
    if not factorized:
        network.hf_quantizer = SpectrimQuantizer(network.config.quantization_config)


FINISHED.append(mark)
