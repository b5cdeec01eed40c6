"""Models with a GEAR cache: `Llama`, llama.cpp's low-level API, batches, sessions and prompt caches."""
