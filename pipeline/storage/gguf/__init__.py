"""GGUF, the file of llama.cpp and its kin: the container, the blocks of its types, and the names of its tensors.

Sources: docs/gguf.md of ggml; ggml-common.h, ggml-quants.c and conversion/ of llama.cpp.
"""
