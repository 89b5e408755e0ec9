"""Trains a byte-level BPE text tokenizer on the captions of a data set.

    python recipes/data/train_tokenizer.py --config recipes/data/tokenizer_emoji.yaml

The special tokens get the first ids, as the vocabulary wants them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from datasets import load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast
from trl import TrlParser

from cm3leon_hf.vocabulary import EOS, PAD, Vocabulary


@dataclass
class TokenizerArguments:
    dataset: str = field(metadata={"help": "Folder or hub name of a data set that load_dataset reads."})
    output_dir: str = field(metadata={"help": "Folder for the tokenizer."})
    text_column: str = field(default="captions", metadata={"help": "Column with a text or a list of texts."})
    split: str = field(default="train", metadata={"help": "Split to train on."})
    text_vocab_size: int = field(default=56320, metadata={"help": "Text ids, special tokens included."})
    extra_texts: list[str] = field(default_factory=list, metadata={"help": "Further texts, such as instructions."})


def texts(args: TokenizerArguments):
    yield from args.extra_texts
    rows = load_dataset(args.dataset, split=args.split).select_columns([args.text_column])
    for value in tqdm(rows[args.text_column], desc="reading", unit="row"):
        yield from [value] if isinstance(value, str) else value


def train(texts: Iterable[str], text_vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `text_vocab_size` ids, the special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=text_vocab_size,
        special_tokens=Vocabulary(text_size=text_vocab_size).special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, bos_token=EOS, padding_side="left"
    )


def main(args: TokenizerArguments) -> None:
    tokenizer = train(texts(args), args.text_vocab_size)
    tokenizer.save_pretrained(args.output_dir)
    print(f"{len(tokenizer)} text ids in {args.output_dir}")


if __name__ == "__main__":
    main(*TrlParser(TokenizerArguments).parse_args_and_config())
