"""The KV cache: what it is made of (`kv_type`), the ggml device that holds it, where that puts its layers, what it costs, and codecs in Python."""
