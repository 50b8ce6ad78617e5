"""
A K-Adapter in place of RoBERTa: define, infer, save and load.

    python examples/use_like_roberta.py --model_name_or_path FacebookAI/roberta-large --adapters factual-adapter
"""

from dataclasses import dataclass, field

import torch
from transformers import AutoModel, AutoTokenizer, HfArgumentParser

from kadapter_hf import KAdapterModel


@dataclass
class Arguments:
    model_name_or_path: str = field(metadata={"help": "The backbone: a repository or a folder."})
    adapters: list[str] | None = field(
        default=None, metadata={"help": "Trained adapters: repositories, folders or files."}
    )
    sentence: str = field(default="The Danube flows through Vienna.", metadata={"help": "The text to encode."})
    output_dir: str = field(default="k-adapter", metadata={"help": "The folder to save the model in."})


def main() -> torch.Tensor:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()

    # Define
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    model = KAdapterModel.from_backbone(args.model_name_or_path, args.adapters)

    # Infer
    inputs = tokenizer(args.sentence, return_tensors="pt")
    with torch.no_grad():
        states = model(**inputs).last_hidden_state

    # Save
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)

    # Load
    loaded = AutoModel.from_pretrained(args.output_dir)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).last_hidden_state, states)
    print(f"{len(args.sentence.split())} words, states of shape {tuple(states.shape)}")
    return states


if __name__ == "__main__":
    main()
