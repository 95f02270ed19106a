"""Run by the Python of llama-cpp-python, with nothing of bitpress: `python llamacpp.py llama.cpp REQUEST.json`.

Given a folder with a GGUF file, it writes the logits and the greedy tokens of the request's prompts.

Else it writes a Llama's float16 checkpoint as GGUF, has llama.cpp compute logits, and adds them up to the perplexity
that llama.cpp's own tool of that name would print: the text's tokens in chunks that do not overlap, each chunk's first
token replaced by that of beginning a text where the tokenizer puts one, the second half of each chunk scored.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from gguf import GGUFWriter
from safetensors.numpy import load_file, save_file

Array = np.ndarray[Any, Any]
# transformers' name -> llama.cpp's; "{}" is the block
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
F32 = 0  # ggml.h, enum ggml_type


def interleaved(weight: Array, heads: int) -> Array:
    """Rows of each head in the order in which llama.cpp rotates them: pairs side by side, not half a head apart."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def export(folder: Path, path: Path) -> None:
    """A Llama of transformers as GGUF without a vocabulary: matrices in float16, norms in float32."""
    config = json.loads((folder / "config.json").read_text())
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(keys)
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert tensor.dtype == np.float16, f"{name}: {tensor.dtype}"
        part, block = name.removesuffix(".weight"), ""
        if part.startswith("model.layers."):
            number, _, part = part.removeprefix("model.layers.").partition(".")
            block = f"blk.{number}."
        if rotated := {"self_attn.q_proj": heads, "self_attn.k_proj": keys}.get(part):
            tensor = interleaved(tensor, rotated)
        writer.add_tensor(f"{block}{NAMES[part]}.weight", tensor if tensor.ndim > 1 else tensor.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Llama:
    """A GGUF file's logits for one chunk of tokens after the other."""

    def __init__(self, path: Path, context: int):
        llama_cpp.llama_backend_init()
        self.context = context
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        assert self.model, f"llama.cpp does not load {path}"
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = context
        settings.n_threads = settings.n_threads_batch = 1
        settings.type_k = settings.type_v = F32
        self.session = llama_cpp.llama_init_from_model(self.model, settings)
        assert self.session, "llama.cpp makes no context"
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def logits(self, ids: Array) -> Array:
        """[tokens, vocabulary], float32."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.session), True)
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids.tolist()):
            batch.token[place], batch.pos[place] = token, place
            batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, True
        code = llama_cpp.llama_decode(self.session, batch)
        assert code == 0, f"llama_decode returned {code}"
        pointer = llama_cpp.llama_get_logits(self.session)
        rows = np.ctypeslib.as_array(pointer, (len(ids), self.vocabulary)).copy()
        llama_cpp.llama_batch_free(batch)
        return rows


def perplexity(llama: Llama, ids: Array, begin: int | None) -> float:
    """As llama.cpp's tool has it; `begin` is the token that begins a text, None where the tokenizer puts none."""
    size, losses = llama.context, []
    for start in range(0, len(ids) - size + 1, size):
        chunk = ids[start : start + size].copy()
        if begin is not None:
            chunk[0] = begin
        rows = llama.logits(chunk)[size // 2 : -1].astype(np.float64)
        rows -= rows.max(1, keepdims=True)
        targets = chunk[size // 2 + 1 :]
        losses.append(np.log(np.exp(rows).sum(1)) - rows[np.arange(len(targets)), targets])
    return float(np.exp(np.concatenate(losses).mean()))


def answer(path: Path, ids: Array, tokens: int) -> dict[str, Array]:
    """The logits of all prompts, and the tokens that follow the first one."""
    llama, text = Llama(path, ids.shape[1] + tokens), ids[0]
    logits = np.stack([llama.logits(prompt) for prompt in ids])
    for _ in range(tokens):
        text = np.append(text, llama.logits(text)[-1].argmax())
    return {"logits": logits, "greedy": text[ids.shape[1] :].astype(np.int64)}


def main() -> None:
    request = json.loads(Path(sys.argv[2]).read_text())
    versions = {name: version(name) for name in ("llama_cpp_python", "gguf")}
    if (own := Path(request["folder"]) / "model.gguf").exists():
        save_file(answer(own, load_file(request["ids"])["ids"], request["tokens"]), request["output"])
        Path(request["answer"]).write_text(json.dumps({"versions": versions}))
        return
    path = Path(request["output"])
    export(Path(request["folder"]), path)
    llama = Llama(path, request["context"])
    ids = load_file(request["ids"])["ids"]
    found = {"perplexity": perplexity(llama, ids, request["begin"]), "versions": versions}
    Path(request["answer"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
