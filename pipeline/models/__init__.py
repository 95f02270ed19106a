"""Transformers models: their structure, quantized layers, loading, decoding."""
