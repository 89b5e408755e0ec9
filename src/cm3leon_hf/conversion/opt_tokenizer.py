"""OPT's tokenizer with our special tokens at the start of the ids."""

import json
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ..vocabulary import EOS, PAD, Vocabulary


def read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise ValueError(
            f"expected OPT's tokenizer beside its weights, got none in {folder}; add tokenizer.json, or vocab.json and "
            "merges.txt, and tokenizer_config.json"
        )
    return AutoTokenizer.from_pretrained(folder)


def convert_tokenizer(source: PreTrainedTokenizerFast, max_length: int) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """
    Gives the tokens new ids: the special tokens first, then the source's others in their order.

    Text is cut into the same tokens as before. The source's end-of-text token becomes `<eos>`, other special tokens of
    the same name are the same. Nothing is put before a text: the processor begins documents.

    Args:
        source (`PreTrainedTokenizerFast`): A byte-level BPE.
        max_length (`int`): Longest sequence of the model, in tokens.

    Returns:
        The tokenizer, and for each of its ids the source's, -1 for new ones.

    Raises:
        ValueError: if the source is no BPE or has no end-of-text token.
    """
    state = json.loads(source.backend_tokenizer.to_str())
    old = source.get_vocab()
    if state["model"]["type"] != "BPE" or source.eos_token not in old:
        raise ValueError(
            f"expected a BPE tokenizer with an end-of-text token, as OPT's, got {state['model']['type']} with "
            f"{source.eos_token!r}; take OPT's own"
        )
    special = Vocabulary().special_tokens
    names = {token: token for token in special} | {EOS: source.eos_token}
    tokens = special + [token for token in sorted(old, key=old.get) if token not in {*special, source.eos_token}]
    ids = {token: index for index, token in enumerate(tokens)}
    kept = [entry | {"id": ids[entry["content"]]} for entry in state["added_tokens"] if entry["content"] in tokens]
    state["added_tokens"] = [added(token, ids[token]) for token in special]
    state["added_tokens"] += [entry for entry in kept if entry["content"] not in special]
    state["model"] |= {"vocab": ids, "unk_token": None}  # every byte has a token
    state |= {"post_processor": None, "padding": None, "truncation": None}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        pad_token=PAD,
        eos_token=EOS,
        bos_token=EOS,
        padding_side="left",
        model_max_length=max_length,
    )
    return tokenizer, [old.get(names.get(token, token), -1) for token in tokens]


def added(token: str, index: int) -> dict:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": token} | flags
