"""Types of quantized key-value caches: one file for each family; every file says in `PLUGINS` which it adds."""
