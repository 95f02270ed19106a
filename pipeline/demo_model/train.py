"""Train the demo model: a small Llama on the docstrings of the Python standard library.

The run is seeded: on the same machine, with the same Python and libraries, it gives the same files.
The held-out text is Python's language reference as `pydoc_data` carries it. Nothing is fitted to it:
its folder is never read for training, and a docstring that repeats a passage of it is dropped.
"""

import argparse
import ast
import math
import platform
import random
import sysconfig
import time
import warnings
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
VOCABULARY = 2048
POSITIONS = 1024
EVALUATION_WINDOW = 512
LONG_EVERY = 4  # one step in so many trains on windows of POSITIONS tokens
BATCH_TOKENS = 2048
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
LEFT_OUT = {"pydoc_data", "site-packages"}
SHARED_PASSAGE = 60  # characters, white space collapsed
VALIDATION_SHARE = 0.04
PEAK_RATE, FINAL_RATE = 2e-3, 2e-5
WARM_UP = 100
WEIGHT_DECAY = 0.1
DROPOUT = 0.1
VALIDATE_EVERY = 100


def parse_arguments():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=2400, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; part of what makes a run repeat")
    return parser.parse_args()


def docstrings(path):
    """Return the docstrings of one source file, in source order; none where it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in test files
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []
    nodes = [node for node in ast.walk(tree) if isinstance(node, DOCUMENTED)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [text.strip() for node in nodes if (text := ast.get_docstring(node))]


def passages(text):
    """Return every run of SHARED_PASSAGE characters in a text, white space collapsed."""
    text = " ".join(text.split())
    return {text[i : i + SHARED_PASSAGE] for i in range(len(text) - SHARED_PASSAGE + 1)}


def collect_documents(held_out):
    """Return one document per library file: its docstrings, without repeats or held-out passages."""
    library = Path(sysconfig.get_path("stdlib"))
    forbidden, seen, documents, dropped = passages(held_out), set(), [], 0
    for path in sorted(library.rglob("*.py")):
        if path.relative_to(library).parts[0] in LEFT_OUT:
            continue
        fresh = [text for text in dict.fromkeys(docstrings(path)) if text not in seen]
        kept = [text for text in fresh if forbidden.isdisjoint(passages(text))]
        seen.update(fresh)
        dropped += len(fresh) - len(kept)
        if kept:
            documents.append("\n\n".join(kept))
    characters = sum(map(len, documents))
    print(f"{len(seen) - dropped} docstrings in {len(documents)} files, {characters} characters")
    print(f"{dropped} docstrings dropped: they share a passage with the held-out text")
    return documents


def split(documents, seed):
    """Set a seeded share of the files aside for validation; return training and validation."""
    chosen = set(random.Random(seed).sample(range(len(documents)), int(len(documents) * VALIDATION_SHARE)))
    training = [text for i, text in enumerate(documents) if i not in chosen]
    return training, [documents[i] for i in sorted(chosen)]


def train_tokenizer(documents):
    """Train the byte-level BPE tokenizer; the end-of-text token is number 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        show_progress=False,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(documents, trainer)
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=POSITIONS, clean_up_tokenization_spaces=False, **special
    )


def encode(tokenizer, documents):
    """Return the documents as one row of tokens, each document closed by the end-of-text token."""
    rows = [[*tokenizer.backend_tokenizer.encode(text).ids, tokenizer.eos_token_id] for text in documents]
    return torch.tensor([token for row in rows for token in row])


def build_model(vocabulary, seed):
    """Build the model with seeded weights; dropout on what enters the residual stream, in training only."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    blocks = [(layer.self_attn.o_proj, layer.mlp.down_proj) for layer in model.model.layers]
    for module in (model.model.embed_tokens, *sum(blocks, ())):
        module.register_forward_hook(lambda m, _, out: functional.dropout(out, DROPOUT, m.training))
    return model


def next_token_loss(model, windows):
    """Return the mean loss over every token of the windows but the first of each."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def cut(tokens, size=EVALUATION_WINDOW):
    """Cut tokens into windows that do not overlap; the tail is dropped."""
    return tokens[: len(tokens) // size * size].view(-1, size)


@torch.inference_mode()
def perplexity(model, windows):
    """Return the model's perplexity on windows of equal length."""
    model.eval()
    losses = [next_token_loss(model, window[None]).item() for window in windows]
    return math.exp(sum(losses) / len(losses))


def unigram_perplexity(counts, tokens):
    """Return the perplexity of tokens under the unigram model with these counts."""
    return math.exp(-(counts.double() / counts.sum()).log()[tokens].mean().item())


def learning_rate(step, steps):
    """Return the rate of a step: linear warm-up, then a cosine down to FINAL_RATE."""
    if step < WARM_UP:
        return PEAK_RATE * (step + 1) / WARM_UP
    progress = (step - WARM_UP) / (steps - WARM_UP)
    return FINAL_RATE + (PEAK_RATE - FINAL_RATE) * (1 + math.cos(math.pi * progress)) / 2


def sample_windows(tokens, step, generator):
    """Draw the windows of one step at random places of the training tokens."""
    size = POSITIONS if step % LONG_EVERY == 0 else EVALUATION_WINDOW
    starts = torch.randint(len(tokens) - size, (BATCH_TOKENS // size, 1), generator=generator)
    return tokens[starts + torch.arange(size)]


def build_optimizer(model):
    """Return AdamW with weight decay on the matrices only."""
    matrices, vectors = ([p for p in model.parameters() if p.dim() == n] for n in (2, 1))
    groups: list[dict] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)


def train(model, training, validation, steps, seed):
    """Train the model and leave in it the weights that did best on the validation docstrings."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = build_optimizer(model)
    best, kept, started = math.inf, None, time.monotonic()
    for step in range(steps):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = next_token_loss(model, sample_windows(training, step, generator))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        done = step + 1
        if done % VALIDATE_EVERY and done < steps:
            continue
        score = perplexity(model, validation)
        left = (time.monotonic() - started) / done * (steps - done) / 60
        line = f"step {done}/{steps}  loss {loss:.3f}  validation {score:.2f}  {left:.1f} min left"
        print(line, flush=True)
        if score < best:
            best, kept = score, {name: t.clone() for name, t in model.state_dict().items()}
    model.load_state_dict(kept)
    print(f"kept the weights with validation perplexity {best:.2f}")


def report(folder, tokenizer, training, held_out):
    """Print the figures of the saved model on the held-out text."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    windows = cut(encode(tokenizer, [held_out])[:-1])
    scored = windows[:, 1:].flatten()
    sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.[js]*"))}
    size = len(tokenizer)
    unigram = unigram_perplexity(torch.bincount(training, minlength=size) + 1, scored)
    oracle = unigram_perplexity(torch.bincount(scored, minlength=size), scored)
    score = perplexity(model, windows)
    print(f"Python {platform.python_version()}, torch {torch.__version__}")
    print(f"{model.num_parameters()} parameters, {sum(sizes.values())} bytes: {sizes}")
    print(f"training tokens {len(training)}, held-out tokens scored {len(scored)}")
    print(f"held-out perplexity: model {score:.2f}")
    print(f"  unigram, training tokens, add-one {unigram:.2f} ({unigram / score:.2f} times the model's)")
    print(f"  unigram, the held-out text itself {oracle:.2f} ({oracle / score:.2f} times the model's)")


def main():
    """Collect the text, train tokenizer and model, save them and print the figures."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    held_out = "\n\n".join(topics[name] for name in sorted(topics))
    training_text, validation_text = split(collect_documents(held_out), arguments.seed)
    tokenizer = train_tokenizer(training_text)
    training, validation = encode(tokenizer, training_text), encode(tokenizer, validation_text)
    print(f"{len(training)} training tokens, {len(validation)} for validation, vocabulary {len(tokenizer)}")
    model = build_model(len(tokenizer), arguments.seed)
    train(model, training, cut(validation), arguments.steps, arguments.seed)
    tokenizer.save_pretrained(arguments.out)
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    report(arguments.out, tokenizer, training, held_out)


if __name__ == "__main__":
    main()
