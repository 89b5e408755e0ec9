"""Makes the Auto classes know CM3Leon, without importing them before the user does, and what is saved carry its code.

Importing transformers is quick because it loads its parts on first use. Registering needs the Auto classes and our
models, and so torch: doing that at `import cm3leon_hf` would cost many times what transformers itself costs. So a
watcher waits until transformers has loaded its Auto classes, and registers right then.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec

AUTO_CLASSES = "transformers.models.auto.configuration_auto"  # every Auto class loads it


class _Watcher(MetaPathFinder):
    """
    Registers as soon as the Auto classes are loaded and no module of transformers or of ours is half loaded.

    Half-loaded modules matter because these modules import each other in circles: whichever the user asks for first,
    the Auto classes are whole while others, which our models need, are not.
    """

    depth = 0  # modules being loaded, one inside the other

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        if not fullname.startswith(("transformers.", f"{__package__}.")):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for other in others if (found := other.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = self._watched(spec.loader.exec_module)
        return spec

    def _watched(self, load):
        def exec_module(module) -> None:
            self.depth += 1
            try:
                load(module)
            finally:
                self.depth -= 1
            self.register_if_ready()

        return exec_module

    def register_if_ready(self) -> None:
        if self.depth == 0 and AUTO_CLASSES in sys.modules and self in sys.meta_path:
            sys.meta_path.remove(self)
            _register()


def register_when_transformers_is_ready() -> None:
    """Registers now if the Auto classes are loaded, else as soon as they are."""
    watcher = _Watcher()
    sys.meta_path.insert(0, watcher)
    watcher.register_if_ready()


def _register() -> None:
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
    )

    from .configuration_cm3leon import CM3LeonConfig
    from .configuration_vqgan import CM3LeonVQGANConfig
    from .modeling_cm3leon import CM3LeonForCausalLM, CM3LeonModel
    from .modeling_vqgan import CM3LeonVQGAN
    from .processing_cm3leon import CM3LeonProcessor

    for config in (CM3LeonConfig, CM3LeonVQGANConfig):
        AutoConfig.register(config.model_type, config)
        config.register_for_auto_class()  # `save_pretrained` puts the code beside the weights, for `trust_remote_code`
    AutoModel.register(CM3LeonConfig, CM3LeonModel)
    AutoModel.register(CM3LeonVQGANConfig, CM3LeonVQGAN)
    for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto_class.register(CM3LeonConfig, CM3LeonForCausalLM)
    AutoProcessor.register(CM3LeonConfig, CM3LeonProcessor)
    for model in (CM3LeonModel, CM3LeonVQGAN):
        model.register_for_auto_class("AutoModel")
    CM3LeonForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    CM3LeonProcessor.register_for_auto_class()
