"""Makes a Llama of 1.04 billion random weights, for `bitpress bench decode FOLDER`.

python tests/benchmarks/llama_1b.py FOLDER                # 2.1 GB
bitpress bench decode FOLDER --peer llama.cpp=PYTHON      # a Python with llama-cpp-python
"""

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

SHAPE = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}  # fmt: skip


def make_checkpoint(folder: Path) -> None:
    """Random bfloat16 weights, and a tokenizer of bytes, such as llama.cpp has too."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), dtype=torch.bfloat16).save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merge = ("a", "b")  # llama.cpp wants one
    words = [*letters, "".join(merge)]
    words += [f"word {number}" for number in range(SHAPE["vocab_size"] - len(words))]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, [merge]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    make_checkpoint(parser.parse_args().folder)
