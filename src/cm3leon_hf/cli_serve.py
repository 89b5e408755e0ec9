"""`cm3leon serve`: chats over HTTP, by the server of transformers."""

import typer

SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def serve(context: typer.Context):
    """
    Answer chats about pictures over HTTP: `transformers serve` with its options, for CM3Leon.

    **Example**

    `cm3leon serve my-model --port 8000`
    """
    make_known_to_server()
    from transformers.cli.serve import is_serve_available
    from transformers.cli.transformers import app

    if "--help" not in context.args and not is_serve_available():
        raise ValueError(
            "expected the packages of transformers' server, found some missing; pip install 'cm3leon_hf[serve]'"
        )
    app(["serve", *context.args], prog_name="cm3leon")


def make_known_to_server() -> None:
    """
    Lists CM3Leon among the names by which the server loads models and tells what their chats may hold.

    It knows no other models than these, not even those that carry their code.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

    from .configuration_cm3leon import CM3LeonConfig
    from .modeling_cm3leon import CM3LeonForCausalLM

    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[CM3LeonConfig.model_type] = CM3LeonForCausalLM.__name__
