"""`Offloading`: refuses hooks that put weights on the meta device and bring them back in a forward pass that forms do not have."""

from typing import Any

from spectrim.errors import LayerError


class Offloading:
    """A mixin for modules that hold weights but are never called, as `Form`.

    accelerate's ``cpu_offload``, ``disk_offload`` and ``dispatch_model`` put the weights of each module on the meta device until the module
    is called. Here they would stay there, and torch multiplies weights on the meta device without an error, by whatever lies in memory.
    """

    @property
    def _hf_hook(self) -> Any:
        """The hook of accelerate, which it sets and asks for under this name."""
        try:
            return self.__dict__["accelerate_hook"]
        except KeyError:
            raise AttributeError("_hf_hook") from None

    @_hf_hook.setter
    def _hf_hook(self, hook: Any) -> None:
        if any(getattr(each, "offload", False) for each in (hook, *getattr(hook, "hooks", ()))):
            hint = 'merge(model) first, or name the classes of the layers: cpu_offload(model, preload_module_classes=["Linear", "Conv2d"])'
            raise LayerError("factors", "cannot be offloaded apart from their layer, which reads them without calling them", hint=hint)
        self.__dict__["accelerate_hook"] = hook

    @_hf_hook.deleter
    def _hf_hook(self) -> None:
        del self.__dict__["accelerate_hook"]
