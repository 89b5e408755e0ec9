"""Trains a byte-level BPE text tokenizer on the captions of a data set, or of a stream.

    python recipes/data/train_tokenizer.py --config recipes/data/tokenizer_emoji.yaml

The special tokens get the first ids, as the vocabulary wants them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from datasets import load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast
from trl import TrlParser

from cm3leon_hf.vocabulary import EOS, PAD, Vocabulary


@dataclass
class TokenizerArguments:
    dataset: str = field(metadata={"help": "Folder, hub name, or format of `files`, as load_dataset takes it."})
    output_dir: str = field(metadata={"help": "Folder for the tokenizer."})
    files: str | None = field(default=None, metadata={"help": "Pattern of files, such as shards/*.parquet."})
    streaming: bool = field(default=False, metadata={"help": "Read without downloading or converting first."})
    max_rows: int | None = field(default=None, metadata={"help": "Rows to read at most; a stream may be endless."})
    text_column: str = field(default="captions", metadata={"help": "Column with a text or a list of texts."})
    split: str = field(default="train", metadata={"help": "Split to train on."})
    text_vocab_size: int = field(default=56320, metadata={"help": "Text ids, special tokens included."})
    num_masks: int = field(default=1, metadata={"help": "Masks of a document, as in the model's config.json."})
    extra_texts: list[str] = field(default_factory=list, metadata={"help": "Further texts, such as instructions."})


def texts(args: TokenizerArguments) -> Iterator[str]:
    """All texts of the data set; rows without one are skipped and counted."""
    yield from args.extra_texts
    rows = load_dataset(args.dataset, data_files=args.files, split=args.split, streaming=args.streaming)
    if args.text_column not in rows.column_names:
        raise ValueError(f"expected the column {args.text_column!r}, got {rows.column_names}; name it with text_column")
    skipped = 0
    for row in tqdm(islice(rows.select_columns([args.text_column]), args.max_rows), desc="reading", unit="row"):
        value = row[args.text_column]
        found = [text for text in ([value] if isinstance(value, str) else value or []) if text]
        skipped += not found
        yield from found
    print(f"{skipped} rows without text skipped")


def train(texts: Iterable[str], text_vocab_size: int, num_masks: int = 1) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `text_vocab_size` ids, the special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=text_vocab_size,
        special_tokens=Vocabulary(text_size=text_vocab_size, num_masks=num_masks).special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, bos_token=EOS, padding_side="left"
    )


def main(args: TokenizerArguments) -> None:
    tokenizer = train(texts(args), args.text_vocab_size, args.num_masks)
    tokenizer.save_pretrained(args.output_dir)
    print(f"{len(tokenizer)} text ids in {args.output_dir}")


if __name__ == "__main__":
    main(*TrlParser(TokenizerArguments).parse_args_and_config())
