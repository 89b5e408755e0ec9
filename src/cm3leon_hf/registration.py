"""Makes the Auto classes know CM3Leon, without importing them before the user does.

Importing transformers is quick because it loads its parts on first use. Registering needs the Auto classes and our
models, and so torch: doing that at `import cm3leon_hf` would cost many times what transformers itself costs. So a
watcher waits until transformers has loaded its Auto classes, and registers right then.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder

AUTO_MODELS = "transformers.models.auto.modeling_auto"
# modules that load each other in a circle with the Auto classes; our models need all of them whole
WATCHED = (AUTO_MODELS, "transformers.modeling_utils", "transformers.generation.utils", "transformers.trainer")
AUTO_CONFIG = "transformers.models.auto.configuration_auto"


class _Watcher(MetaPathFinder):
    """Calls `_register_if_ready` after a watched module has loaded; finds nothing else."""

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        if fullname not in (*WATCHED, AUTO_CONFIG) or (spec := PathFinder.find_spec(fullname, path)) is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module) -> None:
            load(module)
            module.__spec__._initializing = False
            _register_if_ready()

        spec.loader.exec_module = exec_module
        return spec


def register_when_transformers_is_ready() -> None:
    """Registers now if the Auto classes are loaded, else as soon as they are."""
    sys.meta_path.insert(0, _Watcher())
    _register_if_ready()


def _register_if_ready() -> None:
    global _register_configs, _register_models
    if _loaded(AUTO_CONFIG):
        register, _register_configs = _register_configs, _nothing
        register()
    if _loaded(AUTO_MODELS) and not any(name in sys.modules and not _loaded(name) for name in WATCHED):
        register, _register_models = _register_models, _nothing
        register()


def _loaded(name: str) -> bool:
    module = sys.modules.get(name)
    return module is not None and not getattr(module.__spec__, "_initializing", False)


def _nothing() -> None:
    pass


def _register_configs() -> None:
    from transformers import AutoConfig

    from .configuration_cm3leon import CM3LeonConfig
    from .configuration_vqgan import CM3LeonVQGANConfig

    for config in (CM3LeonConfig, CM3LeonVQGANConfig):
        AutoConfig.register(config.model_type, config)


def _register_models() -> None:
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
    from transformers.models.auto.modeling_auto import AutoModelForMultimodalLM

    from .configuration_cm3leon import CM3LeonConfig
    from .configuration_vqgan import CM3LeonVQGANConfig
    from .modeling_cm3leon import CM3LeonForCausalLM, CM3LeonModel
    from .modeling_vqgan import CM3LeonVQGAN
    from .processing_cm3leon import CM3LeonProcessor

    AutoModel.register(CM3LeonConfig, CM3LeonModel)
    AutoModel.register(CM3LeonVQGANConfig, CM3LeonVQGAN)
    for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto_class.register(CM3LeonConfig, CM3LeonForCausalLM)
    AutoProcessor.register(CM3LeonConfig, CM3LeonProcessor)
