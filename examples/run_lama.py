"""
The paper's LAMA experiment: how many facts a K-Adapter and its backbone complete correctly.

Everything is frozen, and a new masked-language-model head is trained on the same text for both (WikiText-2 in the paper).

    python examples/run_lama.py --model factual-adapter --data LAMA --train_text wiki.train.raw --output_dir lama

The flags are those of `kadapter probe`; `--protocol as-is` needs no text and trains nothing.
"""

from transformers import HfArgumentParser

from kadapter_cli.probe import show
from kadapter_hf.probing import ProbingArguments, probe


def main() -> None:
    parser = HfArgumentParser(ProbingArguments)
    parser.set_defaults(protocol="new-head")
    (arguments,) = parser.parse_args_into_dataclasses()
    show(probe(arguments))


if __name__ == "__main__":
    main()
